"""Sequences in one row without padding, and the attention that keeps them apart.
Padding is waste: with lengths as in UltraChat a padded batch of pairs computes half as much again
as it needs. Here the sequences of a micro-batch lie one after the other in a single row; their
positions restart, and attention stays inside each sequence. On CUDA in 16 bits that is one call of
FlashAttention's variable-length kernel, which torch carries (torch.nn.attention.varlen);
elsewhere only the attention itself is padded, and the large matrix products are not."""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from spin.files import fail


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


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **kwargs,
):
    """Causal attention inside each packed sequence, in transformers' interface.
    query (1, H, T, D); key, value (1, H_kv, T, D); cu_seq_lens_q (N + 1,): where each sequence
    begins, and T. Returns (1, T, H, D) and no weights. Ends with one line for attention that is
    more than softmax(q k^T) v."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            unknown = f"this model's attention has {name}, which --attention auto does not know"
            fail(f"{unknown}: use --attention eager")
    # grouped queries: each key and value serves several heads
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        ranges = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)  # of q's, of k's
        sides = (window - 1 if window else -1, 0)  # to the right nothing: causal
        out = varlen_attn(q, k, v, *ranges, scale=scaling, window_size=sides)
    else:
        out = _padded_attention(q, k, v, cu_seq_lens_q.diff().tolist(), scaling, window)
    return out[None], None


def _padded_attention(q, k, v, lengths: list[int], scaling, window) -> torch.Tensor:
    """SDPA on one padded batch. q, k, v (T, H, D) → (T, H, D)."""
    q, k, v = (pad_sequence(x.split(lengths), batch_first=True) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, H, L, D)
    mask = None
    if window:
        square = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        mask = square.tril().triu(1 - window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
    ).transpose(1, 2)  # (N, L, H, D)
    # causal: no padding came before a real token
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


AttentionInterface.register("packed", packed_attention)


@contextlib.contextmanager
def packed(model, attention: str = "auto"):
    """Inside the `with`, --attention auto means packed_attention, for packed rows only; the others
    tell sequences apart by positions. Refuses layers that pass on information by other ways."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if not model._supports_attention_backend or model._is_stateful or other:
        why = "its layers are not all attention, or of an older make"
        fail(f"{type(model).__name__} cannot keep sequences in one row apart: {why}")
    before = model.config._attn_implementation
    if attention == "auto" and before != "flash_attention_2":
        model.set_attn_implementation("packed")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
