"""Runs the decoder: embeddings and causal layers, each of which also attends to the encoder's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.arguments import autocast
from led_kernels.distributed.context import ContextParallel, fork_rng
from led_kernels.distributed.split_keys import SplitKeys
from led_model.checks import check_hidden_states
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.masks import causal_mask
from led_model.modeling.decoder_checks import check_decoder_call
from led_model.modeling.embedding import EmbeddedStack
from led_model.modeling.layers import DecoderLayer
from led_model.modeling.module_list import ModuleList
from led_model.modeling.outputs import DecoderRecord
from led_model.packing import PackedLengths, PackedTargets, packed_positions


class LEDDecoder(EmbeddedStack):
    """Decodes texts over the encoder's output, or the keys and values that :meth:`cross_keys_values` makes of it."""

    context: ContextParallel | None = None  # the ranks over which documents are split
    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "*_attn": "heads",
        "*_attn.qkv": "fused columns",
        "*_attn.[qkv]_proj": "columns",
        "*_attn.out_proj": "rows",
        "*.fc1": "columns",
        "*.fc2": "rows",
    }

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(config, embed_tokens, config.max_decoder_position_embeddings)
        self.layerdrop = config.decoder_layerdrop
        self.layers = ModuleList([DecoderLayer(config, i) for i in range(config.decoder_layers)])

    def cross_keys_values(self, encoder_hidden_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's keys and values of the encoder's output ``[batch, source, d_model]``.

        They are made once per document, whatever the number of steps and sequences.

        Raises:
            ValueError: when ``encoder_hidden_states`` has another shape, dtype or device.
        """
        check_hidden_states("encoder_hidden_states", encoder_hidden_states, self.embed_positions)
        return [layer.encoder_attn.keys_values(encoder_hidden_states) for layer in self.layers]

    def forward(
        self,
        input_ids: Tensor | None,
        cross_keys_values: list[tuple[Tensor, Tensor]] | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cross_mask: Tensor | SplitKeys | None = None,
        attention_mask: Tensor | None = None,
        cache: StaticKVCache | None = None,
        position: Tensor | None = None,
        record: DecoderRecord | None = None,
        packing: PackedTargets | None = None,
    ) -> Tensor:
        """Returns ``[batch, target, d_model]`` for token ids ``[batch, target]``.

        Args:
            cross_keys_values: from :meth:`cross_keys_values`, for generation: made once per document.
            encoder_hidden_states: ``[batch, source, d_model]``, instead: each layer makes its own keys and values, so
                that no parameter is used outside of the forward of the layer that holds it, and the backward can
                compute them again.
            inputs_embeds: ``[batch, target, d_model]``, taken for the embedded tokens instead of ids.
            cross_mask: ``[batch, 1, 1, source]``, from :func:`led_model.masks.key_mask` or
                :func:`led_model.masks.padding_scores`; default: all are tokens. Or which of this rank's rows are keys.
            attention_mask: ``[batch, target]``, nonzero for tokens; with a cache ``[batch, ≤ max_length]``.
            cache: written at ``position``, attended to as far as it is filled.
            position: int64 ``[target]`` of ``input_ids``; default, without a cache: 0, 1, …
            record: filled with what the layers see; without a cache.
            packing: bounds of packed sequences. Then ids are ``[total]``, embeddings and the result
                ``[total, d_model]``, ``encoder_hidden_states`` are ``[total_source, d_model]``, and the other arguments
                are not used.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, more tokens than positions, and keys,
                masks or a cache of another batch, length or width.
        """
        if packing is not None:
            assert encoder_hidden_states is not None  # generation, which has keys and values, packs nothing
            return self._forward_packed(input_ids, inputs_embeds, encoder_hidden_states, packing)
        embedded = self.embed_inputs(
            "decoder_input_ids", input_ids, "decoder_inputs_embeds", inputs_embeds, cache is None
        )
        documents: Any = cross_keys_values
        if encoder_hidden_states is not None:
            documents = self._documents(encoder_hidden_states)
        check_decoder_call(
            embedded,
            cross_keys_values,
            encoder_hidden_states,
            cross_mask,
            attention_mask,
            cache,
            position,
            self,
        )
        if position is None:
            position = torch.arange(embedded.shape[1], device=embedded.device)
        mask = cache_indices = None  # SDPA is causal by itself without a mask
        if cache is not None:
            mask = cache.attention_mask(position, attention_mask)
            cache_indices = cache.indices_of(position)
        elif attention_mask is not None:
            mask = causal_mask(position, attention_mask)
        hidden = self.normed_embeddings(embedded, position)
        del embedded
        return self.run_layers(hidden, mask, cache_indices, documents, cross_mask, cache, record)

    def _forward_packed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        encoder_hidden_states: Tensor,
        packing: PackedTargets,
    ) -> Tensor:
        """Returns ``[total, d_model]`` for token ids ``[total]`` of sequences that are stored one after another."""
        given = ("decoder_input_ids", input_ids, "decoder_inputs_embeds", inputs_embeds)
        embedded = self.embed_packed(*given, max(packing.lengths))
        position = packed_positions(packing.cu_seqlens[:-1], packing.cu_seqlens.diff(), embedded.shape[1])
        hidden = self.normed_embeddings(embedded, position)
        documents = self._documents(encoder_hidden_states[None])
        own = PackedLengths(packing.lengths, packing.lengths)
        cross = PackedLengths(packing.lengths, packing.source_lengths)
        return self.run_layers(hidden, own, None, documents, cross, None)[0]

    def _documents(self, encoder_hidden_states: Tensor) -> list[Tensor]:
        """Returns the encoder's output for each layer, converted once where autocast lets linear layers convert it."""
        check_hidden_states("encoder_hidden_states", encoder_hidden_states, self.embed_positions)
        return [*autocast(encoder_hidden_states)] * len(self.layers)

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Returns what :meth:`run_layers` takes at a decoding step, ``[batch, target, d_model]``, unchecked."""
        return self.normed_embeddings(self.embed_tokens(input_ids), position)

    def run_layers(
        self,
        hidden: Tensor,
        mask: Tensor | PackedLengths | None,
        cache_indices: Tensor | None,
        documents: Sequence[Tensor | tuple[Tensor, Tensor]],
        cross_mask: Tensor | PackedLengths | SplitKeys | None,
        cache: StaticKVCache | None,
        record: DecoderRecord | None = None,
    ) -> Tensor:
        """Returns what the layers make of embedded tokens, ``[batch, target, d_model]``.

        ``mask`` says what is seen of the cache, and ``cache_indices`` where it is written, see :class:`StaticKVCache`;
        ``documents`` has for each layer what its cross-attention takes.
        """
        inputs = (hidden, mask, cache_indices, documents, cross_mask, cache, record)
        if self.context is None:
            return self._run_layers(*inputs)
        with fork_rng(self.context, hidden.device, same_on_all_ranks=True, enabled=self.training):
            return self.context.watch(self._run_layers(*inputs))

    def _run_layers(
        self,
        hidden: Tensor,
        mask: Tensor | PackedLengths | None,
        cache_indices: Tensor | None,
        documents: Sequence[Tensor | tuple[Tensor, Tensor]],
        cross_mask: Tensor | PackedLengths | SplitKeys | None,
        cache: StaticKVCache | None,
        record: DecoderRecord | None,
    ) -> Tensor:
        if self.training:
            hidden = F.dropout(hidden, self.dropout)
        for index, (layer, document) in enumerate(zip(self.layers, documents, strict=True)):
            if record is not None:
                record.hidden_states.append(hidden)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            inputs = (hidden, mask, cache_indices, document, cross_mask, cache, record)
            # What is recorded is kept anyway, and would be recorded twice.
            hidden = layer(*inputs) if record is not None else self.run_layer(index, layer, *inputs)
        return hidden
