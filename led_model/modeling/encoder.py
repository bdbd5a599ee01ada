"""Runs the encoder: embeddings and layers with banded and global attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.distributed.collectives import own_rows
from led_kernels.distributed.context import ContextParallel, ContextParallelMask, fork_rng
from led_model.checks import check_inputs
from led_model.config import LEDConfig
from led_model.modeling.embedding import EmbeddedStack
from led_model.modeling.layers import EncoderLayer
from led_model.modeling.module_list import ModuleList
from led_model.modeling.outputs import EncoderRecord
from led_model.packing import packed_positions


class LEDEncoder(EmbeddedStack):
    """Encodes texts by layers with banded and global attention."""

    context: ContextParallel | None = None  # the ranks over which documents are split
    splits_rows = True
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*.self_attn": "heads",
        "*.self_attn.qkv": "fused columns",
        "*.self_attn.*_global": "columns",
        "*.self_attn.output": "rows",
        "*.fc1": "columns",
        "*.fc2": "rows",
    }

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(config, embed_tokens, config.max_encoder_position_embeddings)
        self.layerdrop = config.encoder_layerdrop
        self.layers = ModuleList([EncoderLayer(config, i) for i in range(config.encoder_layers)])

    def forward(
        self,
        input_ids: Tensor | None,
        mask: LongformerMask,
        *,
        inputs_embeds: Tensor | None = None,
        record: EncoderRecord | None = None,
    ) -> Tensor:
        """Returns ``[batch, seqlen, d_model]`` for token ids ``[batch, seqlen]``, without padding to the window.

        Under a packed mask ids are ``[total]``, embeddings and the result ``[total, d_model]``.

        Where documents are split over ranks, ids are whole documents and the result is this rank's rows.

        Args:
            inputs_embeds: ``[batch, seqlen, d_model]``, taken for the embedded tokens instead of ids.
            record: filled with what the layers see.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, or more tokens than positions.
        """
        given = ("input_ids", input_ids, "inputs_embeds", inputs_embeds)
        if self.context is not None:
            return self._forward_part(input_ids, mask, inputs_embeds, self.context)
        if mask.is_packed:
            longest = mask.max_seqlen
            if longest > self.embed_positions.weight.shape[0]:
                # It is only a bound where the mask was made without a sync.
                longest = int(mask.seq_len.max())
            embedded = self.embed_packed(*given, longest)
            position = packed_positions(mask.seq_start, mask.seq_len, embedded.shape[1])
            hidden = self.normed_embeddings(embedded, position)[0]
        else:
            hidden = self.normed_embeddings(self.embed_inputs(*given))
        return self._run_layers(hidden, mask, record)

    def _forward_part(
        self,
        input_ids: Tensor | None,
        mask: LongformerMask,
        inputs_embeds: Tensor | None,
        context: ContextParallel,
    ) -> Tensor:
        """Returns the rows ``[batch, rows, d_model]`` that this rank computes of whole documents."""
        if self.training and self.layerdrop:
            raise ValueError(
                f"encoder_layerdrop is {self.layerdrop}, and ranks that split a document cannot leave out different "
                "layers; set model.led.encoder.layerdrop = 0."
            )
        split = ContextParallelMask(mask, context.group)
        check_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds, self)
        position = torch.arange(mask.max_seqlen, device=mask.device)[split.own]
        ids = None if input_ids is None else input_ids[:, split.own]
        embeds = None if inputs_embeds is None else own_rows(inputs_embeds, split.own, context.group)
        embedded = self.embed_inputs("input_ids", ids, "inputs_embeds", embeds, one_position_each=False)
        with fork_rng(context, mask.device, same_on_all_ranks=False, enabled=self.training):
            return context.watch(self._run_layers(self.normed_embeddings(embedded, position), split, None))

    def _run_layers(
        self, hidden: Tensor, mask: LongformerMask | ContextParallelMask, record: EncoderRecord | None
    ) -> Tensor:
        """Returns what the layers make of embedded tokens, of the same shape."""
        hidden = F.dropout(hidden, self.dropout, self.training)
        if record is not None and isinstance(mask, LongformerMask):
            record.mask = mask
        for index, layer in enumerate(self.layers):
            if record is not None:
                record.hidden_states.append(hidden)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            if record is not None:
                record.self_attention.append((layer.self_attn, hidden))
            hidden = self.run_layer(index, layer, hidden, mask)
        return hidden
