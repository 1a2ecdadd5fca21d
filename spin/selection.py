"""Which rows of an SFT set are used, by which rules the others are left out, and how many.
Nothing is left out without being counted."""

import collections
import hashlib
import json

import numpy as np

from spin.data import SHAPES, TEXTS, Unusable, check_ids, to_pair
from spin.files import fail
from spin.sources import read_rows
from spin.tokens import holds_special, parses_specials, split_ids


def select(rows, source: str, codec, recipe, number: int) -> tuple[list[dict], dict]:
    """The first `number` usable rows in the order that the seed gives: fewer are a subset of more,
    as the paper's 14k lie in its 26k and these in its 50k.
    Returns the pairs, each with "id" (its row in the source) and "prompt_ids", and the counts of
    what was left out, by rule. A response that is too long is cut, and counted."""
    pairs = []
    seen = set()
    counts = collections.Counter()
    order = np.random.default_rng((recipe.seed, 0, 0, 3)).permutation(len(rows))  # 3: a stream
    for index in order.tolist():
        if len(pairs) == number:
            break
        counts["read"] += 1
        try:
            pair = counted_pair(rows[index], source, counts)
            pair.pop("generated", None)  # an SFT set's own y' is neither used nor judged
            prompt = (pair.get("system"), pair["prompt"])
            check_text(pair, codec)
            if prompt in seen:
                raise Unusable("duplicate prompt")
            prompt_ids, ids, merged = split_ids(codec, pair, pair["real"], recipe.max_length)
            check_length(prompt_ids, recipe.max_length - recipe.max_new_tokens)
        except Unusable as problem:
            counts[str(problem)] += 1
            continue
        seen.add(prompt)
        pairs.append({**pair, "id": index, "prompt_ids": prompt_ids})
        counts["response cut at max_length"] += len(prompt_ids + ids) > recipe.max_length
        counts["answers whose first token merges with the prompt"] += merged
    if not pairs:
        refuse_all(source, counts)
    return pairs, +counts  # without zeros


def select_pairs(sources: list[str], codec, recipe) -> tuple[list[dict], dict]:
    """The pairs in the files of --pairs, in any shape that holds y', by the same rules.
    Returns the pairs, numbered by "id", and the counts of what was left out."""
    pairs = []
    seen = set()
    counts = collections.Counter()
    for source in sources:
        for number, row in enumerate(read_rows(source, recipe.split), 1):
            counts["read"] += 1
            try:
                pair = counted_pair(row, source, counts)
                if "generated" not in pair:
                    raise Unusable("no generated response beside the real one")
                if "generated_ids" in pair:  # from another run's generated.jsonl
                    check_ids(pair, f"{source}, row {number}", codec)
                check_text(pair, codec)
                # a hash and not the text, for memory: the authors' sets repeat half of their rows
                key = json.dumps([pair.get(name) for name in (*TEXTS, "generated_ids")])
                key = hashlib.sha256(key.encode()).digest()
                if key in seen:
                    raise Unusable("duplicate pair")
                for half in ("real", "generated"):  # whether the template and the model take both
                    prompt_ids, *_ = split_ids(codec, pair, pair[half], recipe.max_length)
                check_length(prompt_ids, recipe.max_length - 1)
            except Unusable as problem:
                counts[str(problem)] += 1
                continue
            seen.add(key)
            pairs.append({**pair, "id": len(pairs)})
    if not pairs:
        refuse_all(", ".join(sources), counts)
    return pairs, +counts


def counted_pair(row, source: str, counts: dict) -> dict:
    """The pair in a row; counts what of it is not used: other columns, later rounds."""
    pair, unused = to_pair(row, source)
    for name in unused:
        counts[f"column {name} not used"] += 1
    counts["later rounds not used"] += pair.pop("later_rounds", False)
    return pair


def check_text(pair: dict, codec):
    """Raises Unusable where a pair cannot be used for its text."""
    answers = [pair["real"]]
    if "generated_ids" not in pair:  # sampled ids may be the EOS alone: an answer without text
        answers.append(pair.get("generated", pair["real"]))
    if not all(text.strip() for text in (pair["prompt"], *answers)):
        raise Unusable("empty prompt or response")
    if not parses_specials(codec):
        return
    if any(holds_special(codec, pair.get(name, "")) for name in TEXTS):
        raise Unusable("text of a special token")


def check_length(prompt_ids: list[int], room: int):
    """Raises Unusable where a prompt has no tokens, or more than there is room for."""
    if not prompt_ids:
        raise Unusable("prompt of no tokens")
    if len(prompt_ids) > room:
        raise Unusable("prompt too long")


def refuse_all(source: str, counts: dict):
    """End with one line, for a set of which nothing is left: why, and which shapes are known."""
    known = ""
    if any(reason.startswith("unknown shape") for reason in counts):
        shapes = ("/".join(filter(None, shape)) for shape in SHAPES)
        known = "; known: " + ", ".join(shapes)
    fail(f"{source} holds no usable rows ({counts_line(counts)}){known}")


def counts_line(counts: dict) -> str:
    """The counts that are not zero, as text."""
    return ", ".join(f"{name}: {number}" for name, number in counts.items() if number)
