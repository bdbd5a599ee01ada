"""Attention probabilities of a run, layer by layer, from what its :class:`LayerRecord` kept."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.attention_weights import (
    attention_weights,
    banded_attention_weights,
    global_attention_weights,
)
from led_kernels.projection import project_global_queries
from led_model.modeling.outputs import LayerRecord


def encoder_attentions(record: LayerRecord) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Of local tokens, per layer ``[batch, heads, seqlen, max_globals + 2 * window_size + 1]``, and of global
    tokens, per layer ``[batch, heads, seqlen, max_globals]``, ``None`` when there are none."""
    mask = record.mask
    local, of_globals = [], []
    for attention, hidden in record.self_attention:
        q, k, _ = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        local.append(banded_attention_weights(q, k, mask, attention.window_size).transpose(1, 2))
        if mask.max_globals:
            q_global = project_global_queries(hidden, attention.query_global, mask, attention.num_heads)
            k_global = attention.key_global(hidden).unflatten(-1, (attention.num_heads, -1))
            of_globals.append(global_attention_weights(q_global, k_global, mask).transpose(2, 3))
    return tuple(local), tuple(of_globals) if mask.max_globals else None


def decoder_attentions(record: LayerRecord, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Per layer ``[batch, heads, target, target]``; ``attention_mask`` ``[batch, target]``, nonzero for
    tokens. Rows that see no token are zero."""
    weights = []
    for attention, hidden in record.self_attention:
        target = hidden.shape[1]
        allowed = torch.ones(target, target, dtype=torch.bool, device=hidden.device).tril()
        if attention_mask is not None:
            allowed = allowed & (attention_mask != 0)[:, None, None, :]
        q, k, _ = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).transpose(1, 3).unbind(2)
        weights.append(attention_weights(q, k, allowed))
    return tuple(weights)


def cross_attentions(record: LayerRecord, encoded: Tensor, cross_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Per layer ``[batch, heads, target, source]`` over ``encoded`` ``[batch, source, d_model]``;
    ``cross_mask`` ``[batch, source]``, nonzero for tokens. A document of only padding is averaged over."""
    if cross_mask is None:
        cross_mask = encoded.new_ones(encoded.shape[:2])
    allowed = (cross_mask != 0)[:, None, None, :]
    weights = []
    for attention, hidden in record.cross_attention:
        q = attention.q_proj(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        k = attention.k_proj(encoded).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        some = allowed.any(-1, keepdim=True)
        weights.append(torch.where(some, attention_weights(q, k, allowed), 1 / encoded.shape[1]).to(q.dtype))
    return tuple(weights)
