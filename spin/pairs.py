"""The pairs of iteration t as token ids, and how they are cut into batches and micro-batches."""

import hashlib

import numpy as np
import torch

from spin.codec import Codec
from spin.data import Unusable
from spin.files import fail
from spin.packing import balanced_bins
from spin.recipe import fixed_knobs
from spin.run import hash_of_model
from spin.tokens import encode


def encode_pairs(rows, codec: Codec, recipe) -> list[dict]:
    """Pairs as token ids: {"id", "iter", "index", "real": (ids, mask), "generated": (ids, mask)}.
    Arrays (T,) of int32 and int8: as lists, 100,000 pairs would fill a node's memory."""
    pairs = []
    seen = set()
    for row in rows:
        key = (row["iter"], row["id"])
        if key in seen:
            twice = "the pair with iter {} and id {} occurs twice".format(*key)
            fail(f"{twice}: the files do not belong together")
        seen.add(key)
        pair = {"id": row["id"], "iter": row["iter"], "index": len(pairs)}
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


def halves(objective: str) -> tuple[str, ...]:
    """Which answers of a pair the model has to read: SFT has no use for the generated one."""
    return ("real", "generated") if objective == "spin" else ("real",)


def sequences(rows, objective: str) -> list[tuple]:
    """(ids, mask) of the rows' answers, all real ones first, then the generated ones."""
    return [row[half] for half in halves(objective) for row in rows]


def tokens(row, objective: str) -> int:
    """How many tokens of a pair pass through the model."""
    return sum(len(row[half][0]) for half in halves(objective))


def batches(n: int, recipe, t: int, epoch: int) -> list[list[int]]:
    """The epoch's global batches: each of n pairs once, in an order of (seed, t, epoch) only."""
    order = np.random.default_rng((recipe.seed, t, epoch, 2)).permutation(n).tolist()  # 2: a stream
    return [order[i : i + recipe.batch_size] for i in range(0, n, recipe.batch_size)]


def micro_batches(batch, pairs, recipe, world):
    """This rank's part of a global batch, in micro-batches: (pairs, weight (B,)) each, of at most
    --micro-tokens or one longer pair, evenly filled. FSDP needs equally many passes on all ranks:
    one that has no pairs left passes the batch's shortest pair with weight 0."""
    sizes = [tokens(pairs[i], recipe.objective) for i in batch]
    shortest = sizes.index(min(sizes))
    bins = balanced_bins(sizes, recipe.micro_tokens, world.size)
    for mine in bins[world.rank :: world.size]:
        weight = torch.tensor([1.0] * len(mine) or [0.0])
        yield [pairs[batch[k]] for k in mine or [shortest]], weight
