"""The pairs of iteration t as token ids, and how they are cut into batches and micro-batches."""

import hashlib
import math

import numpy as np

from spin.data.rows import Unusable
from spin.data.text import Renderer, encode
from spin.files import fail
from spin.model.packing import pack
from spin.recipe import STREAM


def encode_pairs(rows, renderer: Renderer, recipe) -> list[dict]:
    """Pairs as token ids: {"id", "iter", "index", "real": (ids, mask), "generated": (ids, mask),
    "shared": 0}, in arrays (T,) of int32 and int8. Refuses a pair that occurs twice."""
    pairs = []
    seen = set()
    for row in rows:
        name = f"the pair with iter {row['iter']} and id {row['id']}"
        if name in seen:
            fail(f"{name} occurs twice: the files do not belong together")
        seen.add(name)
        pair = {"id": row["id"], "iter": row["iter"], "index": len(pairs), "shared": 0}
        # sampled ids are taken as they are: decoding loses how they were split
        sampled = row.get("generated_ids", row["generated"])
        ended = row.get("finish") != "length"  # an answer that was cut off gets no end of turn
        for half, response, eos in (("real", row["real"], True), ("generated", sampled, ended)):
            try:
                ids, mask = encode(renderer, row, response, recipe.max_length, eos)
            except Unusable as problem:
                fail(f"{name}: {problem}")
            pair[half] = np.array(ids, np.int32), np.array(mask, np.int8)
        pairs.append(pair)
    if not pairs:
        fail("there are no pairs to train on")
    return pairs


def hash_of_pairs(pairs) -> str:
    """A hash of the pairs' tokens, by which a checkpoint recognises what it was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (*pair["real"], *pair["generated"]):
            digest.update(part.tobytes())
    return digest.hexdigest()


def share_prompts(pairs):
    """Let each pair's prompt pass through the model only once; for packed rows only. Sets "shared"
    to the number of the prompt's tokens. Each sequence keeps at least one token of its own."""
    for pair in pairs:
        (real, real_mask), (generated, generated_mask) = pair["real"], pair["generated"]
        prompt = min(len(real) - 1, len(generated) - 1, np.sum(real_mask == 0))
        same = np.array_equal(real[:prompt], generated[:prompt])
        pair["shared"] = int(prompt) if same and not generated_mask[:prompt].any() else 0


def packed_pairs(pairs, objective: str, device) -> dict:
    """B pairs as one packed row, for sequence_logps: all real answers, then all generated ones
    (SFT: real answers alone)."""
    real = [pair["real"] for pair in pairs]
    if objective == "sft":
        return pack(real, device)
    n = len(pairs)
    # of each sequence: which one holds its prompt, and how many tokens it takes from there
    shared = [(k, 0) for k in range(n)]
    shared += [(k if pair["shared"] else n + k, pair["shared"]) for k, pair in enumerate(pairs)]
    return pack(real + [pair["generated"] for pair in pairs], device, shared)


def tokens_of(pair, objective: str, padded: bool = False) -> int:
    """How many tokens of a pair pass through the model; padded: each answer is as long as the
    longer one."""
    real, generated = len(pair["real"][0]), len(pair["generated"][0])
    if objective == "sft":
        return real
    return 2 * max(real, generated) if padded else real + generated - pair["shared"]


def answer_lengths(pairs, half: str = "real") -> list[int]:
    """How many tokens each pair's human answer has, or its "generated" one, the end of turn
    included."""
    return [int(pair[half][1].sum()) for pair in pairs]


def opponent_of(pairs, scores, like) -> tuple:
    """log p_θt of the pairs' real and generated answers, (B,) each, in the dtype of `like`. scores:
    (N, 2), of all pairs of the iteration."""
    return scores[[pair["index"] for pair in pairs]].to(like).unbind(1)


def batches(n: int, recipe, t: int, epoch: int) -> list[list[int]]:
    """The epoch's global batches: each of n pairs once, in an order of (seed, t, epoch) only."""
    rng = np.random.default_rng((recipe.seed, t, epoch, STREAM["batches"]))
    order = rng.permutation(n).tolist()
    return [order[i : i + recipe.batch_size] for i in range(0, n, recipe.batch_size)]


def micro_batches(batch, pairs, recipe, world, padded: bool = False):
    """This rank's micro-batches of a global batch, (pairs, weight) each: at most --micro-tokens, or
    a single pair that is longer. FSDP needs equally many passes on all ranks: a rank without pairs
    left repeats the shortest pair of the batch, with weight 0. Every other weight is 1.
    padded: the model makes padded batches of its rows, so that padding counts too."""
    sizes = [tokens_of(pairs[i], recipe.objective) for i in batch]
    widths = [tokens_of(pairs[i], recipe.objective, True) for i in batch] if padded else None
    shortest = batch[sizes.index(min(sizes))]
    for mine in bins_of(sizes, recipe.micro_tokens, world.size, widths)[world.rank :: world.size]:
        if mine:
            yield [pairs[batch[k]] for k in mine], 1.0
        else:
            yield [pairs[shortest]], 0.0


def bins_of(sizes, budget: int, multiple: int = 1, widths=None) -> list[list[int]]:
    """Indices of sizes, in bins that add up to at most `budget` or hold one larger size. 5, 4, 3, 2
    with budget 8: [[0, 3], [1, 2]]. Their number is a multiple of `multiple`; some may be empty.
    Neighbours are about equally full. widths, if padded: a bin costs len(bin) × its largest one."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))  # the longest first
    if widths:
        return padded_bins(order, widths, budget, multiple)
    total = sum(min(size, budget) for size in sizes)
    number = multiple * max(1, math.ceil(total / (budget * multiple)))
    while True:
        bins = [[] for _ in range(number)]
        load = [0] * number
        for i in order:
            emptiest = load.index(min(load))
            bins[emptiest].append(i)
            load[emptiest] += sizes[i]
        full = list(zip(load, bins, strict=True))
        if all(size <= budget or len(bin) == 1 for size, bin in full):
            return [bin for _, bin in sorted(full, key=lambda sb: (-sb[0], sb[1]))]
        number += multiple


def padded_bins(order, widths, budget: int, multiple: int) -> list[list[int]]:
    """bins_of with padding: neighbours in this order, as many as fit, at most a rank's share."""
    share = math.ceil(len(order) / multiple)
    bins = []
    for i in order:
        joined = [*bins[-1], i] if bins else [i]
        cost = len(joined) * max(widths[k] for k in joined)
        if bins and cost <= budget and len(joined) <= share:
            bins[-1] = joined
        else:
            bins.append([i])
    return bins + [[]] * (-len(bins) % multiple)
