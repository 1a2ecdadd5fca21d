"""Attention of one packed row, in transformers' interface: sequences lie one after the other, and
each token sees the earlier ones of its own sequence. Where two sequences begin with the same prompt
it stands in the row once: the second is a branch, whose queries see the prompt's keys and values,
which are copied before its own.

On CUDA in 16 bits that is one call of FlashAttention-2 for rows of any lengths: flash-attn's where
that package is installed, else the one that torch carries. Elsewhere only the attention itself is
padded, and the large matrix products are not."""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_flash_attn_2_available

from spin.files import fail

# what some attention does beyond softmax(q k^T) v, under transformers' names
MORE = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Layout:
    """Which tokens a row holds: first whole sequences, then branches, which go on from a prompt."""

    wholes: list[int]  # their lengths
    branches: list[tuple[int, int, int]]  # (whole sequence, tokens shared with it, own tokens)


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    layout=None,
    **kwargs,
):
    """Causal attention inside each packed sequence, in transformers' interface.
    query (1, H, T, D); key, value (1, H_kv, T, D). kwargs, as packing.pack makes them:
    cu_seq_lens_q, cu_seq_lens_k (N + 1,), where each sequence's queries and keys begin, and their
    numbers; max_length_q, max_length_k. Returns (1, T, H, D) and no weights. Ends with one line for
    attention that is more than softmax(q k^T) v, or that a mask of the model's own changes."""
    kernel = kernel_for(query, value)
    if more := unknown(attention_mask, kwargs, kernel):
        found = f"this model's attention has {more}, which --attention auto does not know"
        fail(f"{found}: use --attention eager")
    key, value = (with_prompts(x, layout) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    bounds = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    longest = kwargs["max_length_q"], kwargs["max_length_k"]
    window = sliding_window if sliding_window and sliding_window < longest[1] else None
    if kernel == "padded":
        out = padded(q, k, v, bounds, layout, scaling, window)
    else:
        sides = (window - 1 if window else -1, 0)  # to the right nothing: causal
        ranges = (*bounds, *longest)
        out = KERNELS[kernel](q, k, v, ranges, scaling, sides, kwargs.get("softcap"))
    return out[None], None


def unknown(attention_mask, kwargs: dict, kernel: str) -> str | None:
    """What a layer asks of its attention that packed_attention would not do; None if nothing."""
    if attention_mask is not None:
        return "a mask of its own"
    more = [name for name in MORE if kwargs.get(name) is not None]
    known = ["softcap"] if kernel == "flash-attn" else []
    return next((name for name in more if name not in known), None)


def with_prompts(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Keys or values of a row, (1, H, T, D), with the prompt of each branch before the branch's.
    By split and cat: the backward of an index would add with atomics, in any order."""
    if not layout.branches:
        return x
    shared = {whole: n for whole, n, _ in layout.branches}
    sizes = []
    for i, length in enumerate(layout.wholes):
        sizes += [shared.get(i, 0), length - shared.get(i, 0)]
    # of each whole the prompt that it shares, and its rest; then the branches
    parts = x.split(sizes + [own for *_, own in layout.branches], dim=2)
    result = list(parts[: len(sizes)])
    for (whole, *_), own in zip(layout.branches, parts[len(sizes) :], strict=True):
        result += [parts[2 * whole], own]
    return torch.cat(result, dim=2)


# ---- the kernels ---------------------------------------------------------------------------------
# In each the last query of a sequence stands beside its last key (FlashAttention's "bottom right").


def kernel_for(query, value) -> str:
    """Which kernel can do the attention of these tensors: "flash-attn", "torch" or "padded"."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256):
        return "padded"
    return "flash-attn" if is_flash_attn_2_available() else "torch"


def by_flash_attn(q, k, v, ranges, scaling, sides, softcap):
    """FlashAttention-2 of the package flash-attn. q (T, H, D); k, v (T', H_kv, D) → (T, H, D).
    ranges: bounds of q's and of k's sequences, the longest of each. Not run: it needs CUDA."""
    from flash_attn import flash_attn_varlen_func

    more = {"softmax_scale": scaling, "window_size": sides, "softcap": softcap or 0.0}
    return flash_attn_varlen_func(q, k, v, *ranges, causal=True, **more)


def by_torch(q, k, v, ranges, scaling, sides, softcap):
    """The same by torch, which has no softcap. Not run: it needs CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    more = {"scale": scaling, "window_size": sides}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        more["enable_gqa"] = True
    else:
        k, v = each_head(q, k, v)
    return varlen_attn(q, k, v, *ranges, **more)


KERNELS = {"flash-attn": by_flash_attn, "torch": by_torch}


def each_head(q, k, v):
    """Keys and values of grouped queries, repeated for the heads that they serve."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def padded(q, k, v, bounds, layout: Layout, scaling, window) -> torch.Tensor:
    """SDPA on padded batches: one of the whole sequences, one of the branches. → (T, H, D).
    bounds: where each sequence's queries begin, and its keys, (N + 1,) each."""
    n = sum(layout.wholes)
    k, v = each_head(q, k, v)
    q, k, v = (x.split([n, len(x) - n]) for x in (q, k, v))
    numbers = torch.stack([b.diff() for b in bounds])  # (2, N) queries and keys of each sequence
    numbers = numbers.split([len(layout.wholes), len(layout.branches)], dim=1)
    lengths = [(length, length) for length in layout.wholes]
    out = padded_batch(q[0], k[0], v[0], lengths, numbers[0], scaling, window)
    if not layout.branches:
        return out
    lengths = [(own, shared + own) for _, shared, own in layout.branches]
    branches = padded_batch(q[1], k[1], v[1], lengths, numbers[1], scaling, window)
    return torch.cat([out, branches])


def padded_batch(q, k, v, lengths, numbers, scaling, window) -> torch.Tensor:
    """SDPA on one padded batch of N sequences. q (T, H, D), k and v (T', H, D) → (T, H, D).
    lengths: (queries, keys) of each; numbers: the same on the device, (2, N)."""
    q_lengths, k_lengths = map(list, zip(*lengths, strict=True))
    q = pad_sequence(q.split(q_lengths), batch_first=True).transpose(1, 2)  # (N, H, L, D)
    k, v = (pad_sequence(x.split(k_lengths), batch_first=True).transpose(1, 2) for x in (k, v))
    mask = None  # SDPA's own causal one, which is aligned top left
    if window or q_lengths != k_lengths:
        last = (numbers[0] - 1)[:, None]
        # queries that only pad see what the last one sees: seeing nothing would give NaN
        query = torch.arange(q.shape[2], device=q.device).minimum(last)  # (N, L)
        place = query + (numbers[1] - numbers[0])[:, None]  # behind its prompt
        back = place[:, :, None] - torch.arange(k.shape[2], device=q.device)  # (N, L, L')
        mask = (back >= 0) & (back < (window or k.shape[2]))
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
    ).transpose(1, 2)  # (N, L, H, D)
    # padding stands behind, where what is causal does not look
    return torch.cat([row[:n] for row, n in zip(out, q_lengths, strict=True)])


def trial_attention(module, query, key, value, attention_mask, note=None, **kwargs):
    """Computes nothing, but calls note(what this layer hands to an attention function): its window,
    or None without one, or "unknown" where packed_attention would not do."""
    if note is not None:  # else the family hands nothing over
        apart = kwargs.get("layout") is not None and kwargs.get("cu_seq_lens_q") is not None
        more = unknown(attention_mask, kwargs, kernel_for(query, value))
        note((kwargs.get("sliding_window") or None) if apart and not more else "unknown")
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
