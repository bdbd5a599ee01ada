"""Computes the attention probabilities of a run, layer by layer, from what the records of its stacks kept."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.attention_weights import (
    attention_weights,
    banded_attention_weights,
    global_attention_weights,
)
from led_kernels.projection import project_global_queries
from led_model.masks import causal_mask, key_mask
from led_model.modeling.outputs import DecoderRecord, EncoderRecord


def encoder_attentions(record: EncoderRecord) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Returns the probabilities of the encoder's local tokens and of its global tokens.

    Returns:
        per layer ``[batch, heads, seqlen, max_globals + 2 * window_size + 1]``, and per layer
        ``[batch, heads, seqlen, max_globals]``, or ``None`` when there are no global tokens.
    """
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


def decoder_attentions(record: DecoderRecord, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the probabilities of the decoder's self-attention, per layer ``[batch, heads, target, target]``.

    ``attention_mask`` is ``[batch, target]``, nonzero for tokens. Rows that see no token are zero.
    """
    weights = []
    for attention, hidden in record.self_attention:
        allowed = causal_mask(torch.arange(hidden.shape[1], device=hidden.device), attention_mask)
        q, k, _ = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).transpose(1, 3).unbind(2)
        weights.append(attention_weights(q, k, allowed))
    return tuple(weights)


def cross_attentions(
    record: DecoderRecord, encoder_hidden_states: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns the probabilities of the cross-attention, per layer ``[batch, heads, target, source]``.

    ``encoder_hidden_states`` is ``[batch, source, d_model]`` and ``attention_mask`` ``[batch, source]``, nonzero for
    tokens. A document of only padding is averaged over.
    """
    batch, source, _ = encoder_hidden_states.shape
    if attention_mask is None:
        attention_mask = encoder_hidden_states.new_ones(batch, source)
    allowed = key_mask(attention_mask)
    weights = []
    for attention, hidden in record.cross_attention:
        q = attention.q_proj(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        k = attention.k_proj(encoder_hidden_states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        some = allowed.any(-1, keepdim=True)
        weights.append(torch.where(some, attention_weights(q, k, allowed), 1 / source).to(q.dtype))
    return tuple(weights)
