"""Sequences in one row without padding, and how a model takes such a row.

Positions restart with each sequence, and attention stays inside it (attention.py). A model whose
layers cannot do that gets a padded batch instead."""

import contextlib
from functools import partial

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from loss import sequence_logps
from spin.model.attention import Layout, packed_attention, unknown

AttentionInterface.register("packed", packed_attention)


def pack(sequences, device, shared=None) -> dict:
    """N sequences (ids, mask) as one row: the arguments of sequence_logps except the model.
    shared[i] = (k, n): sequence i begins with the same n tokens as sequence k, which stand in the
    row only once; i is then a branch of k, its only one. By default n = 0: all sequences are whole.

    "P y" and "P y'" with a prompt P of 3 tokens, y of 2 and y' of 1, shared = [(0, 0), (0, 3)]:
        row        P0 P1 P2 y0 y1 │ y'0
        positions   0  1  2  3  4 │  3
        predictors of y0, y1, y'0: 2, 3, 2 (y'0 is predicted by P2, in the other sequence)
    """
    shared = shared or [(k, 0) for k in range(len(sequences))]
    sizes = [len(tokens) for tokens, _ in sequences]
    wholes = [k for k, (_, skip) in enumerate(shared) if not skip]
    order = wholes + [k for k, (_, skip) in enumerate(shared) if skip]
    ids = [sequences[k][0][shared[k][1] :] for k in order]
    positions = [range(shared[k][1], sizes[k]) for k in order]
    bounds = [np.cumsum([0, *map(len, ids)]), np.cumsum([0, *(sizes[k] for k in order)])]
    begin = dict(zip(order, bounds[0], strict=False))  # where each sequence's own tokens begin
    predictors, labels, prompts = [], [], []
    for k, (tokens, mask) in enumerate(sequences):
        (answer,) = np.nonzero(mask)
        whole, skip = shared[k]
        before = answer - 1  # the place in its sequence of the token before each label
        # the same as a place in the row: a token of the shared prompt lies in the other sequence
        predictors.append(before + np.where(before < skip, begin[whole], begin[k] - skip))
        labels.append(np.asarray(tokens)[answer])
        if skip:
            prompts.append((wholes.index(whole), skip, sizes[k] - skip))

    arrays = [*map(np.concatenate, (ids, positions, predictors, labels)), *bounds]
    # one transfer, since the host waits for each
    flat = torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)
    tensors = flat.split([len(array) for array in arrays])
    input_ids, position_ids, places, answers, q_bounds, k_bounds = tensors
    return {
        "input_ids": input_ids[None],  # (1, T)
        "position_ids": position_ids[None],
        "predictors": places,  # (K,)
        "labels": answers,
        "counts": [len(one) for one in labels],
        "attention": {
            "layout": Layout([sizes[k] for k in wholes], prompts),
            # the names by which transformers passes them to FlashAttention
            "cu_seq_lens_q": q_bounds.int(),
            "cu_seq_lens_k": k_bounds.int(),
            "max_length_q": int(np.diff(bounds[0]).max()),
            "max_length_k": int(np.diff(bounds[1]).max()),
        },
    }


@contextlib.contextmanager
def packed(model, attention: str = "auto", device=None):
    """Inside the `with`, the model takes packed rows. Yields the method: "packed", our attention,
    which alone can share a prompt between sequences, or "padded": rows become padded batches.
    attention: --attention; "eager" and "sdpa" mean padded. device: by default the model's."""
    config = model.config.get_text_config()  # what else a multimodal model has keeps its own
    before = config._attn_implementation
    if attention not in ("sdpa", "eager") and can_pack(model, device):
        config._attn_implementation = "packed"
    else:
        # the instance's forward hides the class's until it is deleted
        model.forward = partial(forward_padded, model.forward)
    try:
        yield "padded" if is_padded(model) else "packed"
    finally:
        config._attn_implementation = before
        vars(model).pop("forward", None)


def is_padded(model) -> bool:
    """Whether a model inside `packed` makes padded batches of its rows."""
    return model.config.get_text_config()._attn_implementation != "packed"


@torch.no_grad()
def can_pack(model, device=None) -> bool:
    """Whether packed_attention can do the attention of all layers, windows included, and gets from
    them the arguments that it needs. A trial pass of four tokens finds out."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    known = kinds <= {"full_attention", "sliding_attention"}
    if not known or model._is_stateful or not model._supports_attention_backend:
        return False
    window = getattr(config, "sliding_window", None) or 0
    wanted = {window if kind == "sliding_attention" else 0 for kind in kinds}
    seen = set()

    def note(module, query, key, value, attention_mask, **kwargs):
        told = kwargs.get("layout") and kwargs.get("cu_seq_lens_q") is not None
        fits = told and not unknown(attention_mask, kwargs)
        seen.add((kwargs.get("sliding_window") or 0) if fits else "unknown")
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("trial", note)
    before = config._attn_implementation
    config._attn_implementation = "trial"
    sequence_logps(model, **pack([([0, 0], [0, 1])] * 2, device or model.device))
    config._attn_implementation = before
    if isinstance(model, FSDPModule):
        model.reshard()  # after a pass without gradient FSDP2 keeps the root's weights gathered
    return seen == wanted


def forward_padded(forward, **row):
    """A packed row's logits from a padded batch (N, L). It needs no mask: causal layers never see
    the padding, which follows. row: as sequence_logps passes it; returns the model's output."""
    bounds = row["cu_seq_lens_q"]
    wanted = row["logits_to_keep"]  # (K,)
    ids = pad_sequence(row["input_ids"][0].split(row["layout"].wholes), batch_first=True)  # (N, L)
    which = torch.bucketize(wanted, bounds[1:], right=True)  # (K,) in which sequence
    column = wanted - bounds[which]  # (K,) and where in it
    first = int(column.min())
    output = forward(input_ids=ids, logits_to_keep=ids.shape[1] - first, use_cache=False)
    output.logits = output.logits[which[None], (column - first)[None]]  # (1, K, V)
    return output
