"""Attention inside each sequence of a packed row, as a function that transformers' models call.

A row holds sequences one after the other; a token sees the earlier tokens of its own sequence. If
two sequences begin with the same prompt, the prompt stands in the row only once. The second
sequence is then a *branch*: the prompt's keys and values are copied before its own.

On CUDA in 16 bits this is one call of FlashAttention-2, by the package flash-attn if it is
installed, else by torch. Elsewhere the attention alone is padded, and the large matrix products,
which cost most, are not."""

import functools
import importlib
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_flash_attn_2_available

from spin.files import fail


@dataclass(frozen=True)
class Layout:
    """What a row holds: first whole sequences, then branches, which continue a prompt."""

    wholes: list[int]  # length of each whole sequence
    branches: list[tuple[int, int, int]]  # (whole sequence, tokens shared with it, own tokens)


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    """Causal attention inside each sequence of a row, with the arguments that transformers passes.
    query (1, H, T, D); key, value (1, H_kv, T, D). kwargs, made by packing.pack: layout;
    cu_seq_lens_q and cu_seq_lens_k (N + 1,), where each sequence's queries and keys begin;
    max_length_q and max_length_k, the longest. Returns (1, T, H, D) and no weights. Ends with one
    line if the model asks for more than softmax(q k^T) v, or brings a mask."""
    if more := unknown(attention_mask, kwargs):
        found = f"this model's attention has {more}, which --attention auto does not know"
        fail(f"{found}: use --attention eager")
    layout = kwargs["layout"]
    key, value = (with_prompts(x, layout) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    longest = kwargs["max_length_k"]
    window = sliding_window if sliding_window and sliding_window < longest else None
    if kernel := kernel_for(query, value):
        bounds = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        sides = (window - 1 if window else -1, 0)  # keys to the left, and none to the right: causal
        out = kernel(q, k, v, (*bounds, kwargs["max_length_q"], longest), scaling, sides)
    else:
        out = padded(q, k, v, layout, scaling, window)
    return out[None], None


def unknown(attention_mask, kwargs: dict) -> str | None:
    """What a layer asks for that packed_attention would not do, or None."""
    if attention_mask is not None:
        return "a mask of its own"
    more = ("softcap", "s_aux", "position_bias")  # transformers' names
    return next((name for name in more if kwargs.get(name) is not None), None)


def with_prompts(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Keys or values of a row, (1, H, T, D), with a copy of the shared prompt before each branch.
    It uses split and cat: the backward pass of indexing would add by atomics, in any order."""
    n = len(layout.wholes)
    parts = list(x.split(layout.wholes + [own for *_, own in layout.branches], dim=2))
    result = parts[:n]
    for (whole, shared, _), own in zip(layout.branches, parts[n:], strict=True):
        result += [parts[whole][:, :, :shared], own]
    return torch.cat(result, dim=2) if layout.branches else x


# ---- the kernels: a sequence's last query is aligned with its last key ---------------------------


def kernel_for(query, value):
    """The kernel of CUDA that can do the attention of these tensors, or None."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    size = query.shape[-1]
    fits = query.is_cuda and half and size == value.shape[-1] <= 256
    if not fits or torch.cuda.get_device_capability(query.device) < (8, 0):  # before Ampere
        return None
    if flash_attn_loads():
        return by_flash_attn
    return by_torch if size % 8 == 0 else None


@functools.cache
def flash_attn_loads() -> bool:
    """Whether flash-attn is there for a GPU and loads: a build for another torch does not."""
    try:
        return is_flash_attn_2_available() and bool(importlib.import_module("flash_attn"))
    except Exception as problem:
        print(f"flash-attn does not load ({str(problem)[:150]}): torch's kernel is used")
        return False


def by_flash_attn(q, k, v, ranges, scaling, sides):
    """FlashAttention-2 of the package flash-attn. q (T, H, D); k, v (T', H_kv, D) → (T, H, D).
    ranges: bounds of q's and of k's sequences, the longest of each. Not run: it needs CUDA."""
    from flash_attn import flash_attn_varlen_func

    more = {"softmax_scale": scaling, "window_size": sides}
    return flash_attn_varlen_func(q, k, v, *ranges, causal=True, **more)


def by_torch(q, k, v, ranges, scaling, sides):
    """The same by torch. Not run: it needs CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    more = {"scale": scaling, "window_size": sides}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in every version of torch
        more["enable_gqa"] = True
    else:
        k, v = for_each_head(q, k, v)
    return varlen_attn(q, k, v, *ranges, **more)


def for_each_head(q, k, v):
    """Keys and values of grouped queries, repeated for each of the heads that share them."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def padded(q, k, v, layout: Layout, scaling, window) -> torch.Tensor:
    """SDPA on padded batches: one of the whole sequences, one of the branches. → (T, H, D)."""
    k, v = for_each_head(q, k, v)
    n = sum(layout.wholes)
    wholes, branches = zip(*(x.split([n, len(x) - n]) for x in (q, k, v)), strict=True)
    out = padded_batch(*wholes, layout.wholes, layout.wholes, scaling, window)
    if not layout.branches:
        return out
    own = [own for *_, own in layout.branches]
    keys = [shared + own for _, shared, own in layout.branches]
    return torch.cat([out, padded_batch(*branches, own, keys, scaling, window)])


def padded_batch(q, k, v, q_lengths, k_lengths, scaling, window) -> torch.Tensor:
    """SDPA on one padded batch of N sequences. q (T, H, D), k and v (T', H, D) → (T, H, D)."""
    q = pad_sequence(q.split(q_lengths), batch_first=True).transpose(1, 2)  # (N, H, L, D)
    k, v = (pad_sequence(x.split(k_lengths), batch_first=True).transpose(1, 2) for x in (k, v))
    mask = None  # SDPA's own causal mask, which is aligned top left
    if window or q_lengths != k_lengths:
        queries, keys = torch.tensor([q_lengths, k_lengths], device=q.device)[..., None]  # (N, 1)
        # a query of the padding sees what the last real one sees: seeing nothing would give NaN
        query = torch.arange(q.shape[2], device=q.device).minimum(queries - 1)  # (N, L)
        place = query + keys - queries  # counted from the prompt's beginning
        back = place[:, :, None] - torch.arange(k.shape[2], device=q.device)  # (N, L, L')
        mask = ((back >= 0) & (back < (window or k.shape[2])))[:, None]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
    ).transpose(1, 2)  # (N, L, H, D)
    # the padding follows the sequence, and causal attention does not look ahead
    return torch.cat([row[:n] for row, n in zip(out, q_lengths, strict=True)])
