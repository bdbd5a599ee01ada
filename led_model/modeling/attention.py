"""The three attentions of an LED: banded and global in the encoder, causal and cross in the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.decode import decode_attention, few_rows_linear
from led_kernels.projection import encoder_self_attention
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.precision import autocast_dtype


class EncoderSelfAttention(nn.Module):
    """Local rows attend to a band and the global tokens; global rows, projected apart, to everything.

    Longformer, https://arxiv.org/abs/2004.05150, section 3.
    """

    def __init__(self, config: LEDConfig, layer: int) -> None:
        super().__init__()
        d_model = config.d_model
        self.num_heads = config.encoder_attention_heads
        self.head_dim = d_model // self.num_heads
        self.window_size = config.window_size(layer)
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.query_global = nn.Linear(d_model, d_model)
        self.key_global = nn.Linear(d_model, d_model)
        self.value_global = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, hidden: Tensor, mask: LongformerMask) -> Tensor:
        """``[batch, seqlen, d_model]`` to the same."""
        # each [batch, seqlen, heads, head_dim]: views, no copy
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        attended = encoder_self_attention(
            hidden,
            q,
            k,
            v,
            query_global=self.query_global,
            key_global=self.key_global,
            value_global=self.value_global,
            mask=mask,
            num_heads=self.num_heads,
            window_size=self.window_size,
            dropout_p=self.dropout if self.training else 0.0,
        )
        del q, k, v  # so that the output projection reuses their memory
        return self.output(attended)


def padding_scores(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, source]``, nonzero for tokens, to ``[batch, 1, 1, source]``, to be added to the scores.

    Finite, also in what autocast makes of ``dtype``, so that a document of only padding gives no NaN.
    """
    dtype = autocast_dtype(attention_mask.device) or dtype
    scores = torch.where(attention_mask != 0, 0.0, torch.finfo(dtype).min)
    return scores.to(dtype)[:, None, None, :]


class DecoderSelfAttention(nn.Module):
    """Causal attention, over the tokens at hand or over a cache."""

    def __init__(self, config: LEDConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // self.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, slots: Tensor | None, cache: StaticKVCache | None = None
    ) -> Tensor:
        """``[batch, seqlen, d_model]`` to the same.

        ``mask`` is bool ``[batch or 1, 1, seqlen, keys]``, true where a query sees a key; ``None``: causal.
        """
        batch, seqlen, _ = hidden.shape
        qkv = few_rows_linear(self.qkv, hidden).view(batch, seqlen, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [batch, heads, seqlen, head_dim]
        if cache is not None:
            attended = decode_attention(q, *cache.write(self.layer, slots, k, v), mask)
        else:
            dropout_p = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None)
        return few_rows_linear(self.out_proj, attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """The decoder attends to the encoder's output; keys and values are made once per document."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.num_heads = config.decoder_attention_heads
        self.head_dim = d_model // self.num_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, source, d_model]`` to two of ``[batch, heads, source, head_dim]``."""
        # contiguous per head: each decoding step streams them from memory
        return self._split(self.k_proj(encoded)).contiguous(), self._split(self.v_proj(encoded)).contiguous()

    def forward(self, hidden: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """``[batch, seqlen, d_model]`` to the same; ``mask`` ``[batch, 1, 1, source]``, bool or added to scores."""
        q = self._split(few_rows_linear(self.q_proj, hidden))
        if self.training:
            attended = F.scaled_dot_product_attention(q, *keys_values, mask, self.dropout)
        else:
            attended = decode_attention(q, *keys_values, mask)
        return few_rows_linear(self.out_proj, attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
