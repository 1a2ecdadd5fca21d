"""Attention of one packed row, in transformers' interface: sequences lie one after the other, and
each token sees the earlier ones of its own sequence. On CUDA in 16 bits that is one call of
FlashAttention's variable-length kernel, which torch carries (torch.nn.attention.varlen);
elsewhere only the attention itself is padded, and the large matrix products are not."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from spin.files import fail

# what some attention does beyond softmax(q k^T) v, under transformers' names
MORE = ("softcap", "s_aux", "position_bias")


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
    more than softmax(q k^T) v, or that a mask of the model's own changes."""
    more = [name for name in MORE if kwargs.get(name) is not None]
    if attention_mask is not None:
        more.append("a mask of its own")
    if more:
        unknown = f"this model's attention has {more[0]}, which --attention auto does not know"
        fail(f"{unknown}: use --attention eager")
    # grouped queries: each key and value serves several heads
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    plain = q.shape[-1] == v.shape[-1] <= 256  # what FlashAttention can do
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and plain:
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


def trial_attention(module, query, key, value, attention_mask, note=None, **kwargs):
    """Computes nothing, but calls note(what this layer hands to an attention function): its window,
    or None without one, or "unknown" where packed_attention would not do."""
    if note is not None:  # else the family hands nothing over
        apart = kwargs.get("cu_seq_lens_q") is not None
        more = attention_mask is not None or any(kwargs.get(name) is not None for name in MORE)
        note((kwargs.get("sliding_window") or None) if apart and not more else "unknown")
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
