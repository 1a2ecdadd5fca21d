"""Sequences in one row without padding, and the attention that keeps them apart. Used by stages 2 and 3.

Padding is waste: with lengths as in UltraChat a padded batch of pairs computes half as much again as it needs. Here the
sequences of a micro-batch lie one after the other in a single row; their positions restart, and attention stays inside
each sequence. On CUDA in 16 bits that is one call of FlashAttention's variable-length kernel, which torch carries
(torch.nn.attention.varlen); elsewhere only the attention itself is padded, and the large matrix products are not.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from spin.files import fail


def pack(sequences, device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(ids, response mask) of N sequences -> input_ids (1, T), response_mask (1, T), and the N lengths that add up to T."""
    row = [
        torch.cat([torch.as_tensor(column, dtype=torch.long) for column in columns])[None].to(
            device
        )
        for columns in zip(*sequences)
    ]
    return *row, [len(ids) for ids, _ in sequences]


def share(sizes: list[int], budget: int, parts: int = 1) -> list[list[int]]:
    """Indices of sizes in bins of at most `budget`, or of one: as few and as even as may be, their number a multiple of parts.

    Longest first, each into the emptiest bin. The fullest bins come first, so neighbours are alike; some may be empty.
    """
    number = parts * max(1, math.ceil(sum(min(size, budget) for size in sizes) / (budget * parts)))
    while True:
        bins, load = [[] for _ in range(number)], [0] * number
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            b = load.index(min(load))
            bins[b].append(i)
            load[b] += sizes[i]
        if all(full <= budget or len(b) == 1 for full, b in zip(load, bins)):
            return [b for _, b in sorted(zip(load, bins), key=lambda lb: (-lb[0], lb[1]))]
        number += parts


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

    query (1, H, T, D); key, value (1, H_kv, T, D); cu_seq_lens_q (N + 1,): where each sequence begins, and T.
    Returns (1, T, H, D) and no weights. Ends with one line for attention that is more than softmax(q k^T) v.
    """
    if other := [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]:
        fail(
            f"this model's attention has {other[0]}, which --attention auto does not know: use --attention eager"
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v = (
        x.squeeze(0).transpose(0, 1)
        for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value)))
    )  # (T, H, D)
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
        )  # to the right nothing: causal
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    q, k, v = (
        pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
    )  # (N, H, L, D)
    band = (
        torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        .tril()
        .triu(1 - window)
        if window
        else None
    )
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=band, is_causal=band is None, scale=scaling
    ).transpose(1, 2)
    return torch.cat([row[:n] for row, n in zip(out, lengths)])[
        None
    ], None  # causal: no padding came before a real token


AttentionInterface.register("packed", packed_attention)


@contextlib.contextmanager
def packed(model, attention: str = "auto"):
    """Inside the `with`, model(…) wants packed rows, where --attention is auto; FlashAttention-2 of its own can do both.

    Ends with one line for a model whose layers pass information along the row by other ways than attention.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if not model._supports_attention_backend or model._is_stateful or kinds:
        fail(
            f"{type(model).__name__} cannot keep sequences in one row apart: its layers are not all attention, or of an older make"
        )
    before = model.config._attn_implementation
    if attention == "auto" and before != "flash_attention_2":
        model.set_attn_implementation("packed")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
