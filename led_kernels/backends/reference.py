"""The obvious dense oracle: O(seqlen²) memory, any floating dtype, one line of code per rule of the semantics.

Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, and transformers' LEDEncoderSelfAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.mask import LOCAL, PADDING, LongformerMask
from led_kernels.philox import BANDED_STREAM, GLOBAL_STREAM, keep_mask


def banded_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Banded attention -> out like q, lse ``[batch, heads, seqlen]`` (packed ``[heads, total_rows]``)."""
    q_, k_, v_ = (_to_padded(x, mask) for x in (q, k, v))  # [batch, seqlen, heads, head_dim]
    kind = _kinds(mask)  # [batch, seqlen]
    seqlen = q_.shape[1]
    query, key = torch.arange(seqlen, device=q.device)[:, None], torch.arange(seqlen, device=q.device)
    in_band = (key >= query - window_left) & (key <= query + window_right)  # [seqlen, seqlen]
    is_global = torch.zeros_like(kind, dtype=torch.bool)
    for b in range(mask.batch):
        is_global[b, mask.global_index[b, : int(mask.num_globals[b])].long()] = True
    allowed = (kind != PADDING)[:, None, :] & (in_band | is_global[:, None, :])  # [batch, query, key]
    is_row = kind == LOCAL
    keep = _keep(query, key, q_, BANDED_STREAM, dropout_p, seed)
    out, lse = _attend(q_, k_, v_, allowed, is_row, softmax_scale, dropout_p, keep)
    return _from_padded(out, mask, q), _lse_from_padded(lse, mask, q)


def global_forward(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Global attention -> out ``[batch, max_globals, heads, head_dim]``, lse ``[batch, heads, max_globals]``."""
    k_, v_ = _to_padded(k_global, mask), _to_padded(v_global, mask)
    slot = torch.arange(mask.max_globals, device=q_global.device)
    is_row = slot < mask.num_globals[:, None]  # [batch, max_globals]
    q_ = q_global.masked_fill(~is_row[:, :, None, None], 0)
    allowed = (_kinds(mask) != PADDING)[:, None, :].expand(-1, mask.max_globals, -1)
    query = mask.global_index.clamp(min=0)[:, None, :, None]  # [batch, 1, max_globals, 1]
    keep = _keep(query, torch.arange(k_.shape[1], device=k_.device), q_, GLOBAL_STREAM, dropout_p, seed)
    return _attend(q_, k_, v_, allowed, is_row, softmax_scale, dropout_p, keep)


def banded_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LongformerMask,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`banded_forward` by autograd, from the inputs alone."""
    args = (mask, window_left, window_right, softmax_scale, dropout_p, seed)
    return _differentiate(banded_forward, (q, k, v), args, d_out, d_lse)


def global_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`global_forward` by autograd, from the inputs alone."""
    args = (mask, softmax_scale, dropout_p, seed)
    return _differentiate(global_forward, (q_global, k_global, v_global), args, d_out, d_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    is_row: Tensor,
    softmax_scale: float,
    dropout_p: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ where allowed) v -> out [batch, rows, heads, head_dim], lse [batch, heads, rows]."""
    scores = torch.einsum("bihd,bjhd->bhij", q * softmax_scale, k)
    # a row without keys would be 0/0: give it finite scores here and select it away below
    dense = allowed | ~is_row[:, :, None]
    scores = scores.masked_fill(~dense[:, None], float("-inf"))
    p = torch.softmax(scores, dim=-1)
    lse = torch.logsumexp(scores if scores.dtype == torch.float64 else scores.float(), dim=-1)
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else p, 0)
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    return out.masked_fill(~is_row[:, :, None, None], 0), lse.masked_fill(~is_row[:, None, :], float("inf"))


def _keep(
    query: Tensor, key: Tensor, q: Tensor, stream: int, dropout_p: float, seed: Tensor | None
) -> Tensor | None:
    """-> bool [batch, heads, rows, keys]"""
    if dropout_p == 0:
        return None
    batch, _, heads, _ = q.shape
    batch_head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    return keep_mask(seed, query, key, batch_head, stream, dropout_p)


def _differentiate(
    forward, inputs, args, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, vjp = torch.func.vjp(lambda *x: forward(*x, *args), *inputs)
    return vjp((d_out, torch.zeros_like(outputs[1]) if d_lse is None else d_lse))


def _rows(mask: LongformerMask) -> tuple[Tensor, Tensor]:
    """Row in the packed tensor of every (sequence, position) and whether it exists, both [batch, max_seqlen]."""
    position = torch.arange(mask.max_seqlen, device=mask.device)
    exists = position < mask.seq_len[:, None]
    return torch.where(exists, mask.seq_start[:, None] + position, 0).long(), exists


def _kinds(mask: LongformerMask) -> Tensor:
    """token_kind as [batch, max_seqlen]"""
    if not mask.is_packed:
        return mask.token_kind
    rows, exists = _rows(mask)
    return mask.token_kind[rows].masked_fill(~exists, PADDING)


def _to_padded(x: Tensor, mask: LongformerMask) -> Tensor:
    """[batch, max_seqlen, heads, head_dim], zeros where there is padding (a select: 0 · NaN would be NaN)."""
    padded = x[_rows(mask)[0]] if mask.is_packed else x
    return padded.masked_fill((_kinds(mask) == PADDING)[:, :, None, None], 0)


def _from_padded(x: Tensor, mask: LongformerMask, like: Tensor) -> Tensor:
    if not mask.is_packed:
        return x
    rows, exists = _rows(mask)
    return torch.zeros_like(like).index_put((rows[exists],), x[exists])


def _lse_from_padded(lse: Tensor, mask: LongformerMask, q: Tensor) -> Tensor:
    """[batch, heads, seqlen] -> [heads, total_rows] when packed"""
    if not mask.is_packed:
        return lse
    rows, exists = _rows(mask)
    packed = lse.new_full((q.shape[0], q.shape[1]), float("inf"))
    return packed.index_put((rows[exists],), lse.transpose(1, 2)[exists]).T.contiguous()
