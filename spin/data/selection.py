"""Which rows of a data set are used, why others are left out, and how many: each is counted."""

import collections
import hashlib
import json

import numpy as np

from spin.data.rows import LONGEST, SHAPES, TEXTS, Unusable, check_ids, is_blank, read_rows, to_pair
from spin.data.text import holds_special, lacks_token, parses_specials, split_ids
from spin.files import fail
from spin.recipe import STREAM


def select(rows, source: str, renderer, recipe, number: int) -> tuple[list[dict], dict]:
    """The first `number` usable rows in the order that the seed gives. So a smaller number gives a
    subset of what a larger one gives, as the paper's 14k lie in its 26k, and these in its 50k.
    Returns the pairs, each with "id" (its row in the source) and "prompt_ids", and the counts of
    what was left out, by reason. A response that is too long is cut, and counted."""
    rng = np.random.default_rng((recipe.seed, 0, 0, STREAM["selection"]))
    order = rng.permutation(len(rows)).tolist()
    candidates = ((source, index, rows[index]) for index in order)
    room = recipe.max_length - recipe.max_new_tokens
    return usable(source, candidates, ("real",), room, renderer, recipe, number)


def select_pairs(sources: list[str], renderer, recipe) -> tuple[list[dict], dict]:
    """The pairs in the files of --pairs, in any shape that holds y', by the same rules.
    Returns the pairs, numbered by "id", and the same counts."""
    candidates = ((s, i, row) for s in sources for i, row in enumerate(read_rows(s, recipe.split)))
    both, room = ("real", "generated"), recipe.max_length - 1
    return usable(", ".join(sources), candidates, both, room, renderer, recipe)


def usable(sources: str, candidates, answers: tuple, room: int, renderer, recipe, number=None):
    """What select and select_pairs return, of candidates (source, index, row).
    answers: the texts of a pair that are used, "real" and maybe "generated". room: the most tokens
    that a prompt may have. Ends with one line if no candidate can be used."""
    pairs = []
    counts = collections.Counter()
    # a hash and not the text, for memory: the authors' sets repeat half of their rows
    seen = set()
    key_names = (*TEXTS, "generated_ids") if "generated" in answers else ("system", "prompt")
    for source, index, row in candidates:
        counts["read"] += 1
        try:
            pair, unused = to_pair(row, source)
            counts.update(f"column {name} not used" for name in unused)
            counts["later rounds not used"] += pair.pop("later_rounds", False)
            if "generated" not in answers:
                pair.pop("generated", None)  # an SFT set's own y' is neither used nor checked
            elif "generated" not in pair:
                raise Unusable("no generated response beside the real one")
            elif "generated_ids" in pair:  # from another run's generated.jsonl
                check_ids(pair, f"{source}, row {index + 1}", renderer)
            check_text(pair, renderer)
            key = json.dumps([pair.get(name) for name in key_names])
            key = hashlib.sha256(key.encode()).digest()
            if key in seen:
                raise Unusable("duplicate pair" if "generated" in answers else "duplicate prompt")
            for answer in answers:  # whether the template and the model take it
                prompt_ids, ids, merged = split_ids(renderer, pair, pair[answer])
                if not 0 < len(prompt_ids) <= room:
                    raise Unusable("prompt too long" if prompt_ids else "prompt of no tokens")
        except Unusable as problem:
            counts[str(problem)] += 1
            continue
        seen.add(key)
        if "generated" in answers:
            pairs.append({**pair, "id": len(pairs)})
        else:
            counts["response cut at max_length"] += len(prompt_ids + ids) > recipe.max_length
            counts["answers whose first token merges with the prompt"] += merged
            pairs.append({**pair, "id": index, "prompt_ids": prompt_ids})
        if len(pairs) == number:
            break
    if not pairs:
        why = f"({counts_line(counts)})"
        if "unknown shape" in why:
            why += "; known: " + ", ".join("/".join(filter(None, shape)) for shape in SHAPES)
        fail(f"{sources} holds no usable rows {why}")
    return pairs, +counts  # without zeros


def check_text(pair: dict, renderer):
    """Raises Unusable if a text of a pair is empty, or is not what its tokens would say."""
    texts = {name: pair[name] for name in TEXTS if name in pair}
    if parses_specials(renderer) and any(holds_special(renderer, text) for text in texts.values()):
        raise Unusable("text of a special token")
    if "generated_ids" in pair:  # they may be the EOS alone: an answer without text
        texts.pop("generated", None)
    if any(is_blank(text) for name, text in texts.items() if name != "system"):
        raise Unusable("empty prompt or response")
    if any(lacks_token(renderer, text[:LONGEST]) for text in texts.values()):
        raise Unusable("text that the tokenizer has no token for")


def counts_line(counts: dict) -> str:
    """The counts that are not zero, as text."""
    return ", ".join(f"{name}: {number}" for name, number in counts.items() if number)
