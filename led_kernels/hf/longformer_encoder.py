"""Longformer's encoder runs on the fused kernels by these classes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.longformer.modeling_longformer import (
    LongformerBaseModelOutput,
    LongformerEncoder,
    LongformerModel,
    LongformerSelfAttention,
)

from led_kernels.distributed.collectives import gather_over_ranks
from led_kernels.distributed.context import ContextParallel, ContextParallelMask, fork_rng
from led_kernels.hf.checks import check_can_split
from led_kernels.hf.compat import takes_arguments_of
from led_kernels.hf.shared import STOCK_MASKS, FusedSelfAttention, Options, as_longformer_mask, run_layers


class FusedLongformerSelfAttention(FusedSelfAttention, LongformerSelfAttention):
    """Takes the arguments of transformers' LongformerSelfAttention."""

    forward = takes_arguments_of(LongformerSelfAttention.forward, STOCK_MASKS)(FusedSelfAttention.forward)


class FusedLongformerEncoder(LongformerEncoder):
    """Builds one mask per forward, for all its layers."""

    led_kernels_options = Options()
    context: ContextParallel | None = None  # the ranks over which documents are split
    splits_rows = True
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*.attention.self": "heads",
        "*.attention.self.*": "columns",
        "*.intermediate.dense": "columns",
        "*.output.dense": "rows",  # of the attention, and of the feed-forward
    }

    @takes_arguments_of(LongformerEncoder.forward)
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        padding_len: int = 0,
    ):
        """Runs the encoder with the arguments and outputs of transformers' LongformerEncoder.

        The last ``padding_len`` rows are cut. Where documents are split over ranks, each rank computes its rows in the
        layers, and then all get the last states of all rows.
        """
        seqlen = hidden_states.shape[1] - padding_len
        hidden_states = hidden_states[:, :seqlen]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :seqlen]
        mask = as_longformer_mask(attention_mask, hidden_states, self.led_kernels_options.max_globals)
        settings: dict[str, Any] = dict(
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_class=LongformerBaseModelOutput,
            return_dict=return_dict,
        )
        if self.context is None:
            return run_layers(self.layer, hidden_states, mask, **settings)
        check_can_split(self, output_attentions or output_hidden_states)
        group = self.context.group
        split = ContextParallelMask(mask, group)
        with fork_rng(self.context, split.device, same_on_all_ranks=False, enabled=self.training):
            output = run_layers(self.layer, hidden_states[:, split.own], split, **settings)
        rows = self.context.watch(gather_over_ranks(output[0], split.bounds, split.rank, group))
        return LongformerBaseModelOutput(last_hidden_state=rows) if return_dict else (rows,)


class FusedLongformerModel(LongformerModel):
    """Differs from the stock model in that it does not pad to a multiple of the window."""

    def _pad_to_window_size(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pad_token_id
    ):
        return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
