"""Attention probabilities are computed here in plain torch, in the layout of transformers' ``output_attentions``.

The fused kernels never write them: they are ``O(seqlen · window)`` numbers per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.call import lse_dtype
from led_kernels.mask import LOCAL, PADDING, LongformerMask
from led_kernels.mask_tensors import HALO

_BLOCK_M = 128  # queries scored at once


def banded_attention_weights(q: Tensor, k: Tensor, mask: LongformerMask, window_size: int) -> Tensor:
    """Computes the probabilities of local tokens over the global tokens and their window.

    Args:
        q, k: ``[batch, seqlen, heads, head_dim]``.
        mask: the mask of a padded batch.
        window_size: how many keys a query sees on each side of its own.

    Returns:
        ``[batch, seqlen, heads, max_globals + 2 * window_size + 1]`` like q: first the global keys in the
        order of ``mask.global_index``, then the keys ``i - window_size … i + window_size``. There are zeros in
        padding, halo and global rows, for keys that are padding or past an end, and in the window for global keys.
    """
    width = 2 * window_size + 1
    k_window = torch.nn.functional.pad(k, (0, 0, 0, 0, window_size, window_size)).transpose(1, 2)
    kind_window = torch.nn.functional.pad(mask.token_kind, (window_size, window_size), value=PADDING)
    batch = torch.arange(mask.batch, device=k.device)[:, None]
    index = mask.global_index.clamp(min=0).long()
    k_globals = k[batch, index].transpose(1, 2)  # [batch, heads, max_globals, head_dim]
    is_slot = (mask.global_index >= 0)[:, None, None, :]

    blocks = []
    for start in range(0, q.shape[1], _BLOCK_M):
        q_block = q[:, start : start + _BLOCK_M].transpose(1, 2)  # [batch, heads, BLOCK_M, head_dim]
        rows = q_block.shape[2]
        keys = slice(start, start + rows + 2 * window_size)
        column = torch.arange(rows, device=q.device)[:, None] + torch.arange(width, device=q.device)
        in_band = _scores(q_block, k_window[:, :, keys])
        in_band = in_band.gather(-1, column.expand(*q_block.shape[:3], width))
        is_row = (mask.token_kind[:, start : start + rows] == LOCAL)[:, None, :, None]
        kind = kind_window[:, keys].unfold(1, width, 1)
        is_key = ((kind == LOCAL) | (kind == HALO))[:, None]  # [batch, 1, BLOCK_M, width]
        is_key = torch.cat([is_slot.expand(-1, -1, rows, -1), is_key], dim=-1)
        scores = torch.cat([_scores(q_block, k_globals), in_band], dim=-1)
        blocks.append(_masked_softmax(scores, is_row & is_key).transpose(1, 2))
    return torch.cat(blocks, dim=1).to(q.dtype)


def global_attention_weights(q_global: Tensor, k_global: Tensor, mask: LongformerMask) -> Tensor:
    """Computes the probabilities of global tokens over every token.

    Args:
        q_global: ``[batch, max_globals, heads, head_dim]`` in the order of ``mask.global_index``.
        k_global: ``[batch, seqlen, heads, head_dim]``.

    Returns:
        ``[batch, heads, max_globals, seqlen]`` like q_global, with zeros in unused slots and for padding.
    """
    slot = torch.arange(mask.max_globals, device=q_global.device)
    is_slot = (slot < mask.num_globals[:, None])[:, None, :, None]
    exists = (mask.token_kind != PADDING)[:, None, None, :]
    return attention_weights(q_global.transpose(1, 2), k_global.transpose(1, 2), is_slot & exists)


def attention_weights(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """Computes the probabilities of full attention.

    Args:
        q, k: ``[batch, heads, queries, head_dim]`` and ``[batch, heads, keys, head_dim]``.
        allowed: bool that broadcasts to ``[batch, heads, queries, keys]``, true where a query sees a key;
            None: everywhere.

    Returns:
        ``[batch, heads, queries, keys]`` like q, with zeros where it is not allowed, also in rows that see no key.
    """
    scores = _scores(q, k)
    weights = scores.softmax(-1) if allowed is None else _masked_softmax(scores, allowed)
    return weights.to(q.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Computes q kᵀ / √head_dim in the dtype of the softmax, [batch, heads, queries, keys]."""
    dtype = lse_dtype(q.dtype)
    return (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-1, -2)


def _masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Computes the softmax over the allowed keys, with zeros for the others and in rows that see no key."""
    # The least number stands instead of -inf: a row that sees no key must not turn into NaN.
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0)
