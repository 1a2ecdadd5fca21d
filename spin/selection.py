"""Which rows of an SFT set are used, by which rules the others are left out, and how many.
Nothing is left out without being counted."""

import collections
import hashlib
import json

import numpy as np

from spin.damage import check_ids
from spin.data import read_rows, to_pair
from spin.files import fail
from spin.tokens import Unusable, holds_special, parses_specials, split_ids

TEXTS = ("system", "prompt", "real", "generated")


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
        pair = {**to_pair(rows[index], f"{source}, row {index + 1}"), "id": index}
        pair.pop("generated", None)  # an SFT set's own y' is neither used nor judged
        counts["read"] += 1
        prompt = (pair.get("system"), pair["prompt"])
        reason = _why_not(pair, "duplicate prompt" if prompt in seen else None, codec)
        if reason is None:
            seen.add(prompt)
            try:
                prompt_ids, ids, merged = split_ids(codec, pair, pair["real"], recipe.max_length)
                pair["prompt_ids"] = prompt_ids
                counts["answers whose first token merges with the prompt"] += merged
                reason = _bad_length(prompt_ids, recipe.max_length - recipe.max_new_tokens)
            except Unusable as problem:
                reason = str(problem)
        if reason is None:
            pairs.append(pair)
            cut = len(prompt_ids + ids) > recipe.max_length
            reason = "response cut at max_length" if cut else "usable"
        counts[reason] += 1
    del counts["usable"]
    if not pairs:
        fail(f"{source} holds no usable rows ({counts_line(counts)})")
    return pairs, counts


def select_pairs(sources: list[str], codec, recipe) -> tuple[list[dict], dict]:
    """The pairs in the files of --pairs, in any shape that holds y', by the same rules.
    Returns the pairs, numbered by "id", and the counts of what was left out."""
    pairs = []
    seen = set()
    counts = collections.Counter()
    for source in sources:
        for number, row in enumerate(read_rows(source, recipe.split), 1):
            where = f"{source}, row {number}"
            pair = to_pair(row, where)
            if "generated" not in pair:
                fail(f"{where}: a pair needs a generated response beside the real one")
            if "generated_ids" in pair:  # from another run's generated.jsonl
                check_ids(pair, where, codec)
            counts["read"] += 1
            # a hash and not the text, for memory: the authors' sets repeat half of their rows
            key = json.dumps([pair.get(name) for name in (*TEXTS, "generated_ids")])
            key = hashlib.sha256(key.encode()).digest()
            reason = _why_not(pair, "duplicate pair" if key in seen else None, codec)
            if reason is None:
                try:
                    for half in ("real", "generated"):  # of text, whether a model can read it
                        prompt_ids, *_ = split_ids(codec, pair, pair[half], recipe.max_length)
                    reason = _bad_length(prompt_ids, recipe.max_length - 1)
                except Unusable as problem:
                    reason = str(problem)
            if reason is None:
                seen.add(key)
                pairs.append({**pair, "id": len(pairs)})
            else:
                counts[reason] += 1
    return pairs, counts


def _why_not(pair: dict, duplicate: str | None, codec) -> str | None:
    """The rule by which a pair is left out for its text; None where it can be used."""
    answers = [pair["real"]]
    if "generated_ids" not in pair:  # sampled ids may be the EOS alone: an answer without text
        answers.append(pair.get("generated", pair["real"]))
    if not all(text.strip() for text in (pair["prompt"], *answers)):
        return "empty prompt or response"
    if duplicate:
        return duplicate
    spelt = any(holds_special(codec, pair.get(name, "")) for name in TEXTS)
    parsed = spelt and parses_specials(codec)
    return "text of a special token" if parsed else None


def _bad_length(prompt_ids: list[int], room: int) -> str | None:
    if not prompt_ids:
        return "prompt of no tokens"
    return "prompt too long" if len(prompt_ids) > room else None


def counts_line(counts: dict) -> str:
    """The counts that are not zero, as text."""
    return ", ".join(f"{name}: {number}" for name, number in counts.items() if number)
