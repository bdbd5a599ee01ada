"""Defines the layers of encoder and decoder, each block of which ends in a residual and a norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.arguments import autocast
from led_kernels.distributed.context import ContextParallelMask
from led_kernels.distributed.split_keys import SplitKeys
from led_kernels.eager import is_eager
from led_kernels.gemv import few_rows_add_norm, few_rows_linear
from led_kernels.modules import calls_only, runs_its_own_code
from led_kernels.recompute import LayerTail, limit_overflow
from led_model.activations import ACTIVATIONS
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.modeling.attention import CrossAttention, DecoderSelfAttention, EncoderSelfAttention
from led_model.modeling.outputs import DecoderRecord
from led_model.packing import PackedLengths

# In inference this many rows of the feed-forward are computed at a time, so that [rows, ffn_dim] stays small.
_FEED_FORWARD_ROWS = 1024
# It is taken at import, so that what a caller puts in its place later is told apart.
_ATTENTION_FORWARD = EncoderSelfAttention.forward


class _Layer(nn.Module):
    """Holds what both kinds of layer share: dropout, residual and norm after each block, and the feed-forward."""

    def __init__(self, config: LEDConfig, ffn_dim: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def add_and_norm(self, residual: Tensor, block: Tensor, norm: nn.LayerNorm) -> Tensor:
        if self.training:
            block = F.dropout(block, self.dropout)
        return few_rows_add_norm(residual, block, norm)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Returns what the second half of a layer makes of ``hidden``.

        In inference a long ``hidden`` is computed in pieces, unless hooks want to see it whole.
        """
        is_short = hidden.numel() <= _FEED_FORWARD_ROWS * hidden.shape[-1]
        if is_short or self.training or torch.is_grad_enabled() or not is_eager(hidden):
            return self._feed_forward(hidden)
        if not all(runs_its_own_code(module) for module in (self.fc1, self.fc2, self.final_layer_norm)):
            return self._feed_forward(hidden)
        out = torch.empty_like(hidden)
        pieces = (x.view(-1, x.shape[-1]).split(_FEED_FORWARD_ROWS) for x in (hidden, out))
        for rows, out_rows in zip(*pieces, strict=True):
            out_rows.copy_(self._feed_forward(rows))
        return out

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        if self.activation is F.gelu:
            inner = few_rows_linear(self.fc1, hidden, gelu=True)
        else:
            inner = self.activation(few_rows_linear(self.fc1, hidden))
        if self.training:
            inner = F.dropout(inner, self.activation_dropout)
        return self.add_and_norm(hidden, few_rows_linear(self.fc2, inner), self.final_layer_norm)


class EncoderLayer(_Layer):
    def __init__(self, config: LEDConfig, layer: int) -> None:
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = EncoderSelfAttention(config, layer)

    def forward(self, hidden: Tensor, mask: LongformerMask | ContextParallelMask) -> Tensor:
        if calls_only(self.self_attn, _ATTENTION_FORWARD) and (
            tail := LayerTail.of(self, self.self_attn.output, self.activation)
        ).can_recompute(hidden):
            (computed,) = autocast(hidden)
            return tail.recomputed(hidden, computed, self.self_attn.attend(computed, mask))
        hidden = self.add_and_norm(hidden, self.self_attn(hidden, mask), self.self_attn_layer_norm)
        return limit_overflow(self.feed_forward(hidden))


class DecoderLayer(_Layer):
    def __init__(self, config: LEDConfig, layer: int) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        self.self_attn = DecoderSelfAttention(config, layer)
        self.encoder_attn = CrossAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | PackedLengths | None,
        cache_indices: Tensor | None,
        document: Tensor | tuple[Tensor, Tensor],
        cross_mask: Tensor | PackedLengths | SplitKeys | None,
        cache: StaticKVCache | None,
        record: DecoderRecord | None = None,
    ) -> Tensor:
        """Returns ``[batch, seqlen, d_model]`` for ``hidden`` of the same shape.

        ``document`` is the encoder's output or its keys and values, see :class:`CrossAttention`.
        """
        if record is not None:
            record.self_attention.append((self.self_attn, hidden))
        attended = self.self_attn(hidden, mask, cache_indices, cache)
        hidden = self.add_and_norm(hidden, attended, self.self_attn_layer_norm)
        if record is not None:
            record.cross_attention.append((self.encoder_attn, hidden))
        attended = self.encoder_attn(hidden, document, cross_mask)
        hidden = self.add_and_norm(hidden, attended, self.encoder_attn_layer_norm)
        return self.feed_forward(hidden)
