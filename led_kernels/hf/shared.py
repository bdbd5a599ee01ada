"""The fused encoders and decoders share these options, attention and feed-forward modules and loop over layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from led_kernels.attention_weights import banded_attention_weights, global_attention_weights
from led_kernels.distributed.context import ContextParallelMask
from led_kernels.mask import LongformerMask
from led_kernels.projection import encoder_self_attention, project_global_queries

# Arguments by which transformers' encoders repeat what the mask says.
STOCK_MASKS = ("is_index_masked", "is_index_global_attn", "is_global_attn")


class Options(NamedTuple):
    """Every fused module has these options, which :func:`led_kernels.hf.apply_led_kernels` was given."""

    max_globals: int | None = None
    backend: str | None = None


class FusedSelfAttention(nn.Module):
    """Computes the self-attention of an LED or Longformer encoder by the fused kernels.

    The projections are the model's own modules. They see ``[batch, seqlen, d_model]``, where transformers gives them
    ``[seqlen, batch, d_model]``.
    """

    led_kernels_options = Options()
    must_not_be_overridden = True

    # Constructors of transformers' attention set these; a model may have other modules for the projections later.
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_global: nn.Linear
    key_global: nn.Linear
    value_global: nn.Linear
    num_heads: int
    head_dim: int
    one_sided_attn_window_size: int
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: LongformerMask | ContextParallelMask | Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Computes the attention up to the output projection.

        Args:
            hidden_states: ``[batch, seqlen, d_model]``; any seqlen.
            attention_mask: the mask of the batch, or what transformers' own encoders pass, ``[batch,
                seqlen]``: negative for padding, 0 for local and positive for global tokens.
            output_attentions: also return the probabilities, before dropout.

        Returns:
            ``[batch, seqlen, d_model]``; with ``output_attentions`` also
            ``[batch, seqlen, heads, max_globals + attention_window + 1]`` and, if there are global tokens,
            ``[batch, heads, max_globals, seqlen]``.
        """
        mask = attention_mask
        if not isinstance(mask, ContextParallelMask):
            mask = as_longformer_mask(mask, hidden_states, self.led_kernels_options.max_globals)
        window_size = self.one_sided_attn_window_size
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
            for projection in (self.query, self.key, self.value)
        )
        out = encoder_self_attention(
            hidden_states,
            q,
            k,
            v,
            query_global=self.query_global,
            key_global=self.key_global,
            value_global=self.value_global,
            mask=mask,
            num_heads=self.num_heads,
            window_size=window_size,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.led_kernels_options.backend,
        )
        if not output_attentions or isinstance(mask, ContextParallelMask):  # which the encoder has refused
            return (out,)
        weights = banded_attention_weights(q, k, mask, window_size)
        if mask.max_globals == 0:
            return out, weights
        q_global = project_global_queries(hidden_states, self.query_global, mask, self.num_heads)
        k_global = self.key_global(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        return out, weights, global_attention_weights(q_global, k_global, mask)


class FusedLayer(nn.Module):
    """Computes the second half of a layer, with the modules that transformers' LED layers have."""

    # Constructors of transformers' layers set these; a model may have other modules in their places later.
    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: nn.Module
    final_layer_norm: nn.LayerNorm
    activation_dropout: float
    dropout: float

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        """Computes the feed-forward block with its residual and norm: ``[batch, length, d_model]`` to the same."""
        expanded = self._dropout(self.activation_fn(self.fc1(hidden_states)), self.activation_dropout)
        contracted = self._dropout(self.fc2(expanded), self.dropout)
        return self.final_layer_norm(hidden_states + contracted)

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(x, p=p, training=self.training)


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: Tensor,
    mask: LongformerMask | ContextParallelMask,
    *,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    output_class: type,
    return_dict: bool | None,
    layerdrop: float = 0.0,
):
    """Runs the layers of an encoder under one mask, and returns the output that transformers' encoders return.

    Each layer returns its hidden states, then whatever attention probabilities it was asked for; a layer that
    layerdrop skips adds none.
    """
    states, attentions, global_attentions = [], [], []
    for layer in layers:
        if output_hidden_states:
            states.append(hidden_states)
        if layerdrop > 0 and torch.rand([]) < layerdrop:
            continue
        # The hidden states go by position: reentrant checkpointing sees no gradient in keywords.
        hidden_states, *weights = layer(
            hidden_states, attention_mask=mask, output_attentions=output_attentions
        )
        attentions += [local.transpose(1, 2) for local in weights[:1]]
        global_attentions += [global_.transpose(2, 3) for global_ in weights[1:]]
    values = {
        "last_hidden_state": hidden_states,
        "hidden_states": (*states, hidden_states) if output_hidden_states else None,
        "attentions": tuple(attentions) if output_attentions else None,
        "global_attentions": tuple(global_attentions) if output_attentions and mask.max_globals else None,
    }
    if return_dict:
        return output_class(**values)
    return tuple(value for value in values.values() if value is not None)


def as_longformer_mask(
    attention_mask: LongformerMask | Tensor | None, hidden_states: Tensor, max_globals: int | None
) -> LongformerMask:
    """Returns the mask for any form of ``attention_mask`` that reaches an encoder or its attention.

    Raises:
        ValueError: for a tensor that is not ``[batch, seqlen]``, or ``[batch, 1, 1, seqlen]``, of signed numbers.
    """
    if isinstance(attention_mask, LongformerMask):
        on_device = attention_mask.device == hidden_states.device
        return attention_mask if on_device else attention_mask.to(hidden_states.device)
    if attention_mask is None:
        kind = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
    else:
        if attention_mask.dim() == 4 and attention_mask.shape[1:3] == (1, 1):
            attention_mask = attention_mask[:, 0, 0]
        if attention_mask.shape != hidden_states.shape[:2] or attention_mask.dtype == torch.bool:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}; give "
                "[batch, seqlen], negative for padding, 0 for local and positive for global tokens."
            )
        kind = attention_mask.sign() + 1  # negative, 0, positive -> 0 padding, 1 local, 2 global
    return LongformerMask.from_padding(kind, max_globals=max_globals)
