"""Sequences in one row without padding, and the ways in which a model keeps them apart.
Padding is waste: with lengths as in UltraChat a padded batch of pairs computes half as much again
as it needs. Here the sequences of a micro-batch lie one after the other in a single row; their
positions restart, and attention stays inside each sequence (spin/attention.py). Some families need
explicit masks for that, and for some no row will do: theirs is a padded batch after all."""

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
from spin.attention import packed_attention, trial_attention

AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("trial", trial_attention)


def pack(sequences, device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """N sequences (ids, mask) → input_ids (1, T), response_mask (1, T), N lengths of sum T."""
    ids, masks = zip(*sequences, strict=True)
    both = np.stack([np.concatenate(ids), np.concatenate(masks)])
    both = torch.as_tensor(both, dtype=torch.long, device=device)  # (2, T)
    return both[:1], both[1:], [len(one) for one in ids]


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

    flash_attention_2   flash-attn keeps the sequences apart, by cu_seq_lens or the positions
    packed              packed_attention does, for --attention auto
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
    name = model.config._attn_implementation
    if name == "flash_attention_2":
        return name
    # auto: eager where transformers has nothing else for the family (softcap, sinks)
    if attention != "auto" or name == "eager":
        return "masks"
    return "packed" if hands_over(model) else "rows"


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
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    mask = torch.tensor([[0, 1, 0, 1]], device=model.device)
    # a method: FSDP hands on copies of lists and sets
    sequence_logps(functools.partial(model, note=seen.add), ids, mask, [2, 2])
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
    sequences = row["input_ids"][0].split(bounds.diff().tolist())
    ids = pad_sequence(sequences, batch_first=True)  # (N, L)
    which = torch.bucketize(wanted, bounds[1:], right=True)  # (K,) in which sequence
    column = wanted - bounds[which]  # (K,) and where in it
    first = int(column.min())
    output = forward(input_ids=ids, logits_to_keep=ids.shape[1] - first, use_cache=False)
    output.logits = output.logits[which[None], (column - first)[None]]  # (1, K, V)
    return output


WAYS = {"masks": forward_with_masks, "rows": forward_in_rows}
