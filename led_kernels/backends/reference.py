"""This is the obvious dense oracle: O(seqlen²) memory, any floating dtype, one line of code per rule of the semantics.

Source: Beltagy et al., "Longformer: The Long-Document Transformer", 2020, and transformers' LEDEncoderSelfAttention.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from led_kernels.call import AttentionCall
from led_kernels.mask import LOCAL, PADDING, LongformerMask
from led_kernels.philox import keep_mask


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes attention -> out, lse."""
    return _global_forward(call) if call.is_global else _banded_forward(call)


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of :func:`forward` by autograd, from the inputs alone -> dq, dk, dv."""
    outputs, vjp = torch.func.vjp(
        lambda q, k, v: forward(replace(call, q=q, k=k, v=v)), call.q, call.k, call.v
    )[:2]
    return vjp((d_out, torch.zeros_like(outputs[1]) if d_lse is None else d_lse))


def _banded_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes the rows of local tokens, over the keys of their window and of global tokens."""
    mask = call.mask
    q, k, v = (_to_padded(x, mask) for x in (call.q, call.k, call.v))  # [batch, seqlen, heads, head_dim]
    kind = _kinds(mask)  # [batch, seqlen]
    seqlen = q.shape[1]
    row = torch.arange(seqlen, device=q.device)
    query, key = row[:, None], row
    left, right = call.banded_window
    in_band = (key >= query - left) & (key <= query + right)  # [seqlen, seqlen]
    is_global = torch.zeros_like(kind, dtype=torch.bool)
    position = row + mask.position_offset[:, None]  # [batch, seqlen], in the whole sequence
    position_of_global = position.clone()  # differs where a global token has no row of its own in this piece
    for b in range(mask.batch):
        num_globals = int(mask.num_globals[b])
        rows = mask.global_index[b, :num_globals].long()
        is_global[b, rows] = True
        position_of_global[b, rows] = mask.global_position[b, :num_globals].to(position)
    allowed = (kind != PADDING)[:, None, :] & (in_band | is_global[:, None, :])  # [batch, query, key]
    key_position = torch.where(in_band, position[:, None, :], position_of_global[:, None, :])
    query_position = position[:, None, :, None]  # [batch, 1, query, 1]
    q = q.masked_fill((kind != LOCAL)[:, :, None, None], 0)  # what it holds in other rows need not be finite
    out, lse = _attend(call, q, k, v, allowed, kind == LOCAL, query_position, key_position[:, None])
    return _from_padded(out, mask, call.q), _lse_from_padded(lse, mask, call.q)


def _global_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes the rows of global tokens, ``[batch, max_globals, ...]``, over every key."""
    mask = call.mask
    k, v = _to_padded(call.k, mask), _to_padded(call.v, mask)
    slot = torch.arange(mask.max_globals, device=k.device)
    is_key = _kinds(mask) != PADDING  # [batch, seqlen]
    is_row = (slot < mask.num_globals[:, None]) & is_key.any(1, keepdim=True)  # [batch, max_globals]
    q = call.q.masked_fill(~is_row[:, :, None, None], 0)
    allowed = is_key[:, None, :].expand(-1, mask.max_globals, -1)
    query = mask.global_position[:, None, :, None]  # [batch, 1, max_globals, 1]
    key = torch.arange(k.shape[1], device=k.device) + mask.position_offset[:, None]
    return _attend(call, q, k, v, allowed, is_row, query, key[:, None, None])  # key: [batch, 1, 1, seqlen]


def _attend(
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    is_row: Tensor,
    query: Tensor,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes softmax(scale · q kᵀ where allowed) v -> out [batch, rows, heads, head_dim], lse [batch, heads, rows].

    ``allowed`` is [batch, rows, keys]; ``is_row``, [batch, rows], says which rows have a result; ``query`` and ``key``
    are the positions that dropout draws for, and broadcast to [batch, heads, rows, keys].
    """
    scores = torch.einsum("bihd,bjhd->bhij", q * call.softmax_scale, k)
    # a row without keys would be 0/0: give it finite scores here and select it away below
    dense = allowed | ~is_row[:, :, None]
    scores = scores.masked_fill(~dense[:, None], float("-inf"))
    p = torch.softmax(scores, dim=-1)
    lse = torch.logsumexp(scores if scores.dtype == torch.float64 else scores.float(), dim=-1)
    if call.dropout_p > 0:
        assert call.seed is not None  # as every call with dropout has one
        batch, _, heads, _ = q.shape
        batch_head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
        keep = keep_mask(call.seed, query, key, batch_head, call.philox_stream, call.dropout_p)
        p = torch.where(keep, p / (1 - call.dropout_p) if call.dropout_p < 1 else p, 0)
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    return out.masked_fill(~is_row[:, :, None, None], 0), lse.masked_fill(~is_row[:, None, :], float("inf"))


def _rows(mask: LongformerMask) -> tuple[Tensor, Tensor]:
    """Returns the packed row of each (sequence, position), and whether it exists, both [batch, max_seqlen]."""
    position = torch.arange(mask.max_seqlen, device=mask.device)
    exists = position < mask.seq_len[:, None]
    return torch.where(exists, mask.seq_start[:, None] + position, 0).long(), exists


def _kinds(mask: LongformerMask) -> Tensor:
    """Returns token_kind as [batch, max_seqlen]."""
    if not mask.is_packed:
        return mask.token_kind
    rows, exists = _rows(mask)
    return mask.token_kind[rows].masked_fill(~exists, PADDING)


def _to_padded(x: Tensor, mask: LongformerMask) -> Tensor:
    """Returns [batch, max_seqlen, heads, head_dim], where padding is selected to be 0 (0 · NaN would be NaN)."""
    padded = x[_rows(mask)[0]] if mask.is_packed else x
    return padded.masked_fill((_kinds(mask) == PADDING)[:, :, None, None], 0)


def _from_padded(x: Tensor, mask: LongformerMask, like: Tensor) -> Tensor:
    if not mask.is_packed:
        return x
    rows, exists = _rows(mask)
    return torch.zeros_like(like).index_put((rows[exists],), x[exists])


def _lse_from_padded(lse: Tensor, mask: LongformerMask, q: Tensor) -> Tensor:
    """Takes lse [batch, heads, seqlen] to [heads, total_rows] when the mask is packed."""
    if not mask.is_packed:
        return lse
    rows, exists = _rows(mask)
    packed = lse.new_full((q.shape[0], q.shape[1]), float("inf"))
    return packed.index_put((rows[exists],), lse.transpose(1, 2)[exists]).T.contiguous()
