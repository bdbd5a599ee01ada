"""LED's encoder runs on the fused kernels by these classes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.models.led.modeling_led import (
    LEDEncoder,
    LEDEncoderAttention,
    LEDEncoderBaseModelOutput,
    LEDEncoderLayer,
    LEDEncoderSelfAttention,
)

from led_kernels.arguments import autocast
from led_kernels.distributed.collectives import own_rows
from led_kernels.distributed.context import ContextParallel, ContextParallelMask, fork_rng
from led_kernels.hf.checks import check_can_split
from led_kernels.hf.compat import takes_arguments_of
from led_kernels.hf.shared import STOCK_MASKS, FusedLayer, FusedSelfAttention, Options, run_layers
from led_kernels.mask import LongformerMask
from led_kernels.modules import calls_only
from led_kernels.recompute import LayerTail, limit_overflow

# It is taken at import, so that what a caller puts in its place later is told apart.
_ATTENTION_FORWARD = LEDEncoderAttention.forward


class FusedLEDEncoderSelfAttention(FusedSelfAttention, LEDEncoderSelfAttention):
    """Takes the arguments of transformers' LEDEncoderSelfAttention."""

    forward = takes_arguments_of(LEDEncoderSelfAttention.forward, STOCK_MASKS)(FusedSelfAttention.forward)


class FusedLEDEncoderLayer(FusedLayer, LEDEncoderLayer):
    """Differs from the stock layer in what it keeps for the backward, and in how fp16 states are clamped.

    They are clamped without asking the device whether they need it.
    """

    @takes_arguments_of(LEDEncoderLayer.forward, STOCK_MASKS)
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: LongformerMask | ContextParallelMask | Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Returns the hidden states, and what more :class:`FusedSelfAttention` returns for the same arguments."""
        if (
            not output_attentions
            and calls_only(self.self_attn, _ATTENTION_FORWARD)
            and (tail := LayerTail.of(self, self.self_attn.output, self.activation_fn)).can_recompute(
                hidden_states
            )
        ):
            (computed,) = autocast(hidden_states)
            (attended,) = self.self_attn.longformer_self_attn(
                hidden_states=computed, attention_mask=attention_mask
            )
            return (tail.recomputed(hidden_states, computed, attended),)
        attended, *weights = self.self_attn(
            hidden_states=hidden_states, attention_mask=attention_mask, output_attentions=output_attentions
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + self._dropout(attended, self.dropout))
        del attended  # The memory peak is yet to come.
        return limit_overflow(self._feed_forward(hidden_states)), *weights


class FusedLEDEncoder(LEDEncoder):
    """Builds one mask per forward, for all its layers, and pads nothing."""

    led_kernels_options = Options()
    context: ContextParallel | None = None  # the ranks over which documents are split
    splits_rows = True
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*.longformer_self_attn": "heads",
        "*.longformer_self_attn.*": "columns",
        "*.self_attn.output": "rows",
        "*.fc1": "columns",
        "*.fc2": "rows",
    }

    @takes_arguments_of(LEDEncoder.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Runs the encoder with the arguments and outputs of transformers' LEDEncoder.

        Where documents are split over ranks, the arguments are whole documents and the outputs this rank's rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing; give one of them.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None  # as one of the two is
        shape, config = given.shape[:2], self.config
        positions = self.embed_positions.weight.shape[0]  # The config's may differ: tables can be extended.
        if shape[1] > positions:
            raise IndexError(
                f"the input has {shape[1]} tokens and the model {positions} positions; truncate the input."
            )
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=given.device)
        whole = LongformerMask.from_padding(
            attention_mask, global_attention_mask, self.led_kernels_options.max_globals
        )
        mask: LongformerMask | ContextParallelMask = whole
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        first = 0
        if self.context is not None:
            check_can_split(self, output_attentions or output_hidden_states)
            mask = ContextParallelMask(whole, self.context.group)
            first = mask.own.start
            given = (
                given[:, mask.own] if inputs_embeds is None else own_rows(given, mask.own, self.context.group)
            )
        if inputs_embeds is None:
            given = self.embed_tokens(given)
        hidden_states = self.layernorm_embedding(given + self.embed_positions(given.shape[:2], first))
        with fork_rng(self.context, given.device, same_on_all_ranks=False, enabled=self.training):
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
            output = run_layers(
                self.layers,
                hidden_states,
                mask,
                layerdrop=self.layerdrop if self.training else 0.0,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                output_class=LEDEncoderBaseModelOutput,
                return_dict=config.return_dict if return_dict is None else return_dict,
            )
        if self.context is not None:
            self.context.watch(output[0])
        return output
