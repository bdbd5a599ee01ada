"""Defines the attentions of an LED: banded and global in the encoder, causal and cross in the decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.distributed.context import ContextParallelMask
from led_kernels.distributed.split_keys import SplitKeys
from led_kernels.gemv import decode_attention, few_rows_linear
from led_kernels.projection import encoder_self_attention
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.packing import PackedLengths


class EncoderSelfAttention(nn.Module):
    """Lets local tokens attend to a band and to the global tokens, and global tokens, projected apart, to all.

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

    def forward(self, hidden: Tensor, mask: LongformerMask | ContextParallelMask) -> Tensor:
        """Returns ``[batch, seqlen, d_model]`` for ``hidden`` of the same shape."""
        return self.output(self.attend(hidden, mask))

    def attend(self, hidden: Tensor, mask: LongformerMask | ContextParallelMask) -> Tensor:
        """Returns what :meth:`forward` does, before the output projection; of ``[total, d_model]`` when packed."""
        # Each of these is a view [batch, seqlen, heads, head_dim].
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return encoder_self_attention(
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


class DecoderSelfAttention(nn.Module):
    """Lets tokens attend to themselves and to those before them: to the given ones, or to those of a cache."""

    def __init__(self, config: LEDConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // self.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | PackedLengths | None,
        cache_indices: Tensor | None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """Returns ``[batch, seqlen, d_model]`` for ``hidden`` of the same shape.

        Args:
            mask: bool ``[batch or 1, 1, seqlen, keys]``, true where a query sees a key; ``None``: causal, as within
                each of packed sequences.
            cache_indices: where in the ``cache`` the keys and values are written, int64 ``[seqlen]``.
        """
        batch, seqlen, _ = hidden.shape
        qkv = few_rows_linear(self.qkv, hidden).view(batch, seqlen, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [batch, heads, seqlen, head_dim]
        dropout_p = self.dropout if self.training else 0.0
        if isinstance(mask, PackedLengths):
            attended = mask.attend(q, k, v, dropout_p, is_causal=True)
        elif cache is not None:
            assert cache_indices is not None  # whoever gives a cache says where in it this step is written
            attended = decode_attention(q, *cache.write(self.layer, cache_indices, k, v), mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None)
        return few_rows_linear(self.out_proj, attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Lets the decoder attend to the encoder's output, whose keys and values generation makes once per document."""

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

    def keys_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, ``[batch, heads, source, head_dim]``, of ``[batch, source, d_model]``."""
        k, v = self.k_proj(encoder_hidden_states), self.v_proj(encoder_hidden_states)
        # They are contiguous per head, as each decoding step streams them from memory.
        return self._split_heads(k).contiguous(), self._split_heads(v).contiguous()

    def forward(
        self,
        hidden: Tensor,
        document: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | PackedLengths | SplitKeys | None,
    ) -> Tensor:
        """Returns ``[batch, seqlen, d_model]`` for ``hidden`` of the same shape.

        Args:
            document: the encoder's output ``[batch, source, d_model]``, or what :meth:`keys_values` made of it.
            mask: ``[batch, 1, 1, source]``, bool or to be added to the scores; or the lengths of packed sequences and
                of their documents; or which of a rank's rows are keys.
        """
        q = self._split_heads(few_rows_linear(self.q_proj, hidden))
        keys_values = self.keys_values(document) if isinstance(document, Tensor) else document
        dropout_p = self.dropout if self.training else 0.0
        if isinstance(mask, PackedLengths):
            attended = mask.attend(q, *keys_values, dropout_p, is_causal=False)
        elif isinstance(mask, SplitKeys):
            attended = mask.attend(q, *keys_values, dropout_p)
        elif self.training:
            attended = F.scaled_dot_product_attention(q, *keys_values, mask, dropout_p)
        else:
            attended = decode_attention(q, *keys_values, mask)
        return few_rows_linear(self.out_proj, attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
