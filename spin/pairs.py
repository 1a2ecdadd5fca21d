"""The pairs of iteration t as token ids, and how they are cut into batches and micro-batches."""

import hashlib

import numpy as np

from spin.codec import Codec
from spin.data import Unusable
from spin.files import fail
from spin.packing import balanced_bins, pack
from spin.recipe import fixed_knobs
from spin.run import hash_of_model
from spin.tokens import encode


def encode_pairs(rows, codec: Codec, recipe) -> list[dict]:
    """Pairs as token ids: {"id", "iter", "index", "real": (ids, mask), "generated": (ids, mask),
    "shared": 0}. Arrays (T,) of int32 and int8: as lists, 100,000 pairs would fill a node's memory.
    """
    pairs = []
    seen = set()
    for row in rows:
        key = (row["iter"], row["id"])
        if key in seen:
            twice = "the pair with iter {} and id {} occurs twice".format(*key)
            fail(f"{twice}: the files do not belong together")
        seen.add(key)
        pair = {"id": row["id"], "iter": row["iter"], "index": len(pairs), "shared": 0}
        # sampled ids are taken as they are: decoding loses how they were split
        sampled = row.get("generated_ids", row["generated"])
        for half, response in (("real", row["real"]), ("generated", sampled)):
            try:
                ids, mask = encode(codec, row, response, recipe.max_length)
            except Unusable as problem:
                fail("the pair with iter {} and id {}: {}".format(*key, problem))
            pair[half] = np.array(ids, np.int32), np.array(mask, np.int8)
        pairs.append(pair)
    if not pairs:
        fail("there are no pairs to train on")
    return pairs


def made_from(start: str, pairs, recipe) -> dict:
    """What an iteration's scores and checkpoints are made from, by which a checkpoint knows what it
    was trained on: θ_t, a hash of the pairs' tokens, the recipe."""
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (*pair["real"], *pair["generated"]):
            digest.update(part.tobytes())
    return {
        "start": hash_of_model(start, recipe.revision),
        "pairs": digest.hexdigest(),
        "number": len(pairs),
        "recipe": fixed_knobs(recipe),
    }


def share_prompts(pairs):
    """Let the prompt of each pair pass through the model once: "shared" is how many tokens of it
    both answers have before them. Each keeps a token of its own."""
    for pair in pairs:
        (real, real_mask), (generated, generated_mask) = pair["real"], pair["generated"]
        prompt = min(len(real) - 1, len(generated) - 1, np.sum(real_mask == 0))
        same = np.array_equal(real[:prompt], generated[:prompt])
        pair["shared"] = int(prompt) if same and not generated_mask[:prompt].any() else 0


def packed_pairs(pairs, objective: str, device) -> dict:
    """B pairs as one packed row, for sequence_logps: all real answers, then, but for SFT, all
    generated ones."""
    real = [pair["real"] for pair in pairs]
    if objective == "sft":
        return pack(real, device)
    shared = [(k, 0) for k in range(len(pairs))]
    for k, pair in enumerate(pairs):
        shared.append((k, pair["shared"]) if pair["shared"] else (k + len(pairs), 0))
    return pack(real + [pair["generated"] for pair in pairs], device, shared)


def tokens_of(pair, objective: str) -> int:
    """How many tokens of a pair pass through the model."""
    real = len(pair["real"][0])
    return real if objective == "sft" else real + len(pair["generated"][0]) - pair["shared"]


def batches(n: int, recipe, t: int, epoch: int) -> list[list[int]]:
    """The epoch's global batches: each of n pairs once, in an order of (seed, t, epoch) only."""
    order = (
        np.random.default_rng((recipe.seed, t, epoch, 2)).permutation(n).tolist()
    )  # 2: no other draw's
    return [order[i : i + recipe.batch_size] for i in range(0, n, recipe.batch_size)]


def micro_batches(batch, pairs, recipe, world):
    """This rank's micro-batches of a global batch, (pairs, weight) each: at most --micro-tokens, or
    one longer pair. FSDP needs equally many passes on all ranks: one without pairs left passes the
    shortest of the batch again, with weight 0. Every other weight is 1."""
    sizes = [tokens_of(pairs[i], recipe.objective) for i in batch]
    shortest = sizes.index(min(sizes))
    bins = balanced_bins(sizes, recipe.micro_tokens, world.size)
    for mine in bins[world.rank :: world.size]:
        yield [pairs[batch[k]] for k in mine or [shortest]], float(bool(mine))
