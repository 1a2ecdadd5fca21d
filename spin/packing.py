"""Sequences in one row without padding, and the ways in which a model keeps them apart.
Padding is waste: it computes every sequence to the length of the longest. Here the sequences of a
micro-batch lie one after the other in a single row; their positions restart, and attention stays
inside each sequence (spin/attention.py). Some families need explicit masks for that, and for some
no row will do: theirs is a padded batch after all."""

import contextlib
import functools
import inspect
import math

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.masking_utils import create_masks_for_generate

from loss import sequence_logps
from spin.attention import Layout, packed_attention, trial_attention

AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("trial", trial_attention)


def pack(sequences, device, shared=None) -> dict:
    """N sequences (ids, mask) as one row: the arguments of sequence_logps but the model.
    shared: (k, n) for each sequence. n = 0: it stands in the row whole, as all do by default. Else
    its first n tokens are sequence k's, which are not computed again, and the rest is a branch; at
    most one branch from each."""
    shared = shared or [(k, 0) for k in range(len(sequences))]
    branches = [k for k, (_, skip) in enumerate(shared) if skip]
    wholes = [k for k, (_, skip) in enumerate(shared) if not skip]
    begin = {}  # where in the row each sequence's own tokens begin
    ids, positions = [], []
    for k in wholes + branches:
        tokens, skip = sequences[k][0], shared[k][1]
        begin[k] = sum(map(len, ids))
        ids.append(tokens[skip:])
        positions.append(range(skip, len(tokens)))

    predictors, labels = [], []
    for k, (tokens, mask) in enumerate(sequences):
        (answer,) = np.nonzero(mask)
        whole, skip = shared[k]
        before = answer - 1  # in the sequence; it may be the prompt's last token
        predictors.append(before + np.where(before < skip, begin[whole], begin[k] - skip))
        labels.append(np.asarray(tokens)[answer])

    bounds = [np.cumsum([0, *map(len, ids)])]
    bounds += [np.cumsum([0, *(len(sequences[k][0]) for k in wholes + branches)])]
    arrays = [*map(np.concatenate, (ids, positions, predictors, labels)), *bounds]
    input_ids, position_ids, places, answers, *bounds_there = to_device(arrays, device)
    attention = {"layout": layout_of(sequences, shared, wholes, branches)}
    # under the names by which transformers hands them to FlashAttention
    for name, on_host, on_device in zip("qk", bounds, bounds_there, strict=True):
        attention |= {f"cu_seq_lens_{name}": on_device.int()}
        attention |= {f"max_length_{name}": int(np.diff(on_host).max())}
    return {
        "input_ids": input_ids[None],  # (1, T)
        "position_ids": position_ids[None],
        "predictors": places,  # (K,)
        "labels": answers,
        "counts": [len(one) for one in labels],
        "attention": attention,
    }


def layout_of(sequences, shared, wholes: list[int], branches: list[int]) -> Layout:
    """What spin/attention.py has to know of a row."""
    sizes = [len(ids) for ids, _ in sequences]
    prompts = [
        (wholes.index(shared[k][0]), shared[k][1], sizes[k] - shared[k][1]) for k in branches
    ]
    return Layout([sizes[k] for k in wholes], prompts)


def to_device(arrays, device) -> list[torch.Tensor]:
    """Arrays of whole numbers as tensors of int64: one transfer, since the host waits for each."""
    flat = np.concatenate([np.asarray(array, np.int64) for array in arrays])
    return list(torch.from_numpy(flat).to(device).split([len(array) for array in arrays]))


def balanced_bins(sizes: list[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Indices of sizes, in bins that hold at most `budget`, or one size that is above it.
    As few and as even as may be, their number a multiple of `multiple`. Longest first, each into
    the emptiest bin. The fullest bins come first, so neighbours are alike; some may be empty."""
    total = sum(min(size, budget) for size in sizes)
    number = multiple * max(1, math.ceil(total / (budget * multiple)))
    longest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    while True:
        bins = [[] for _ in range(number)]
        load = [0] * number
        for i in longest_first:
            emptiest = load.index(min(load))
            bins[emptiest].append(i)
            load[emptiest] += sizes[i]
        full = list(zip(load, bins, strict=True))
        if all(size <= budget or len(bin) == 1 for size, bin in full):
            return [bin for _, bin in sorted(full, key=lambda sb: (-sb[0], sb[1]))]
        number += multiple


@contextlib.contextmanager
def packed(model, attention: str = "auto"):
    """Inside the `with`, the model takes a packed row, in the way that fits its family; yields it:

    packed              packed_attention does; in this way alone a prompt can stand in the row once
    masks               transformers' eager attention or SDPA does, by explicit masks
    rows                no way is known: each sequence gets a padded row of its own

    docs/memory-and-speed.md says which family goes which way."""
    before = model.config._attn_implementation
    way = way_to_pack(model, attention)
    if way == "packed":
        model.set_attn_implementation("packed")
    if way in WAYS:
        forward = model.forward
        # the instance's forward hides the class's until it is deleted
        model.forward = lambda **row: WAYS[way](model, forward, row)
    try:
        yield way
    finally:
        if way in WAYS:
            del model.forward
        model.set_attn_implementation(before)


def way_to_pack(model, attention: str) -> str:
    """How this model keeps the sequences of a row apart: a name that packed explains."""
    kinds = kinds_of_layers(model)
    # several kinds of layers need several masks, and not every family takes a dict of them
    forward = inspect.getsource(type(model.base_model).forward)
    known = kinds <= {"full_attention", "sliding_attention"}
    known = known and (len(kinds) < 2 or "attention_mask, dict)" in forward)
    # layers that remember in another way, or a family of older make
    if not known or model._is_stateful or not model._supports_attention_backend:
        return "rows"
    if attention in ("sdpa", "eager"):
        return "masks"
    if hands_over(model):
        return "packed"
    # transformers has nothing but eager for some families (softcap, sinks)
    return "masks" if model.config._attn_implementation == "eager" else "rows"


def kinds_of_layers(model) -> set[str]:
    """The kinds of layers that a model's config names; empty where all are alike."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


@torch.no_grad()
def hands_over(model) -> bool:
    """Whether each layer hands to its attention what packed_attention needs to know.
    Asked of the model itself, by a pass of four tokens: no attribute of a family tells."""
    config = model.config.get_text_config()
    kinds = kinds_of_layers(model) or {"sliding_attention"}
    window = getattr(config, "sliding_window", None) or None
    wanted = {window if kind == "sliding_attention" else None for kind in kinds}
    seen = set()
    before = model.config._attn_implementation
    model.set_attn_implementation("trial")
    two = pack([([0, 0], [0, 1])] * 2, model.device)
    # seen.add, not seen: FSDP hands on copies of lists and sets
    sequence_logps(functools.partial(model, note=seen.add), **two)
    model.set_attn_implementation(before)
    if isinstance(model, FSDPModule):
        model.reshard()  # a pass without gradient leaves the root's weights gathered
    return seen == wanted


def forward_with_masks(model, forward, row: dict):
    """A packed row through transformers' own attention: masks for each kind of layer, (1, 1, T, T)
    each. One tensor for all would take the windows of a family with several kinds away.
    row: as sequence_logps passes it to a model; returns the same output."""
    weight = model.get_input_embeddings().weight
    like = weight.new_empty(*row["input_ids"].shape, 0)  # (1, T, 0): shape, dtype and device count
    positions = row["position_ids"]
    masks = create_masks_for_generate(model.config, like, None, None, position_ids=positions)
    if isinstance(masks, dict) and len(masks) == 1:
        (masks,) = masks.values()
    names = ("input_ids", "position_ids", "logits_to_keep", "use_cache")
    return forward(attention_mask=masks, **{name: row[name] for name in names})


def forward_in_rows(model, forward, row: dict):
    """A packed row's logits from a padded batch (N, L), which needs no mask: what is causal never
    sees the padding behind it. Needs more memory, for padding and for prompts' logits."""
    bounds = row["cu_seq_lens_q"]
    wanted = row["logits_to_keep"]  # (K,)
    sequences = row["input_ids"][0].split(row["layout"].wholes)
    ids = pad_sequence(sequences, batch_first=True)  # (N, L)
    which = torch.bucketize(wanted, bounds[1:], right=True)  # (K,) in which sequence
    column = wanted - bounds[which]  # (K,) and where in it
    first = int(column.min())
    output = forward(input_ids=ids, logits_to_keep=ids.shape[1] - first, use_cache=False)
    output.logits = output.logits[which[None], (column - first)[None]]  # (1, K, V)
    return output


WAYS = {"masks": forward_with_masks, "rows": forward_in_rows}
