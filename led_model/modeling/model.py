"""A Longformer-Encoder-Decoder: BART with banded and global attention in the encoder, and an LM head.

Post-norm, learned positions without BART's offset, one embedding table for encoder, decoder and head.
Longformer, https://arxiv.org/abs/2004.05150; BART, https://arxiv.org/abs/1910.13461.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from led_kernels import LongformerMask
from led_kernels.decode import few_rows_linear
from led_model.checkpoint.pretrained import LEDPreTrainedModel, resized
from led_model.checks import check_inputs, check_mask, check_recordable, check_states, check_targets, embed
from led_model.config import LEDConfig
from led_model.generation.cache import StaticKVCache
from led_model.generation.captured import remember_code
from led_model.generation.generate import generate
from led_model.generation.generation_config import GenerationConfig
from led_model.modeling.attention import CrossAttention, DecoderSelfAttention, padding_scores
from led_model.modeling.decoder_checks import check_decoder_call
from led_model.modeling.layers import DecoderLayer, EncoderLayer
from led_model.modeling.output_attentions import cross_attentions, decoder_attentions, encoder_attentions
from led_model.modeling.outputs import LayerRecord, Seq2SeqLMOutput, Seq2SeqModelOutput


class LEDEncoder(nn.Module):
    """Embeddings and the banded layers; ``gradient_checkpointing = True`` recomputes each in the backward."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.gradient_checkpointing = False
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_encoder_position_embeddings, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList([EncoderLayer(config, i) for i in range(config.encoder_layers)])

    def forward(
        self,
        input_ids: Tensor | None,
        mask: LongformerMask,
        *,
        inputs_embeds: Tensor | None = None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """``[batch, seqlen]`` token ids to ``[batch, seqlen, d_model]``; nothing is padded to the window.

        Args:
            inputs_embeds: ``[batch, seqlen, d_model]``, taken for the embedded tokens instead of ids.
            record: filled with what the layers see.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, or more tokens than positions.
        """
        embedded = embed("input_ids", input_ids, "inputs_embeds", inputs_embeds, self)
        hidden = embedded + self.embed_positions(torch.arange(embedded.shape[1], device=embedded.device))
        del embedded
        hidden = F.dropout(self.layernorm_embedding(hidden), self.dropout, self.training)
        if record is not None:
            record.mask = mask
        for layer in self.layers:
            if record is not None:
                record.hidden_states.append(hidden)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            if record is not None:
                record.self_attention.append((layer.self_attn, hidden))
            if self.training and self.gradient_checkpointing:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
        return hidden


class LEDDecoder(nn.Module):
    """Embeddings and the causal layers, each of which also attends to the encoder's output."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layerdrop = config.decoder_layerdrop
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_decoder_position_embeddings, config.d_model)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.decoder_layers)])

    def cross_keys_values(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer, the keys and values of ``encoded`` ``[batch, source, d_model]``: once per document.

        Raises:
            ValueError: when ``encoded`` has another shape, dtype or device.
        """
        check_states("encoded", encoded, self.embed_positions)
        return [layer.encoder_attn.keys_values(encoded) for layer in self.layers]

    def forward(
        self,
        input_ids: Tensor | None,
        cross_keys_values: list[tuple[Tensor, Tensor]],
        *,
        inputs_embeds: Tensor | None = None,
        cross_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StaticKVCache | None = None,
        position: Tensor | None = None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """``[batch, target]`` token ids to ``[batch, target, d_model]``.

        Args:
            cross_keys_values: from :meth:`cross_keys_values`.
            inputs_embeds: ``[batch, target, d_model]``, taken for the embedded tokens instead of ids.
            cross_mask: ``[batch, 1, 1, source]``, true for the encoder's tokens, or from
                :func:`led_model.modeling.attention.padding_scores`; default: all are tokens.
            attention_mask: ``[batch, target]``, nonzero for tokens; with a cache ``[batch, slots]``.
            cache: written at ``position``, attended to as far as it is filled.
            position: int64 ``[target]`` of ``input_ids``; default, without a cache: 0, 1, …
            record: filled with what the layers see; without a cache.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, more tokens than positions, and keys,
                masks or a cache of another batch, length or width.
        """
        hidden = embed(
            "decoder_input_ids", input_ids, "decoder_inputs_embeds", inputs_embeds, self, cache is None
        )
        check_decoder_call(hidden, cross_keys_values, cross_mask, attention_mask, cache, position, self)
        if position is None:
            position = torch.arange(hidden.shape[1], device=hidden.device)
        mask = slots = None
        if cache is not None:
            mask, slots = cache.attention_mask(position, attention_mask), cache.slots_of(position)
        elif attention_mask is not None:
            mask = (position <= position[:, None]) & (attention_mask != 0)[:, None, None, :]
        hidden = self.layernorm_embedding(hidden + self.embed_positions(position))
        return self.run_layers(hidden, mask, slots, cross_keys_values, cross_mask, cache, record)

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """What the layers of a step begin with, ``[batch, target, d_model]``."""
        return self.layernorm_embedding(self.embed_tokens(input_ids) + self.embed_positions(position))

    def run_layers(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        slots: Tensor | None,
        cross_keys_values: list[tuple[Tensor, Tensor]],
        cross_mask: Tensor | None,
        cache: StaticKVCache | None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """The layers over embedded tokens, ``[batch, target, d_model]`` to the same.

        ``mask`` and ``slots`` say what is seen in the cache and where it is written, see :class:`StaticKVCache`.
        """
        if self.training:
            hidden = F.dropout(hidden, self.dropout)
        for layer, keys_values in zip(self.layers, cross_keys_values, strict=True):
            if record is not None:
                record.hidden_states.append(hidden)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            hidden = layer(hidden, mask, slots, keys_values, cross_mask, cache, record)
        return hidden


class LEDModel(LEDPreTrainedModel):
    """Encoder and decoder over one embedding table (three, when the config does not tie them)."""

    base_prefix = ""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.shared = _embedding(config)
        # a module each: what replaces weights by name for a call (functional_call) cannot put one back that has two
        tied = self.shared.weight if config.tie_word_embeddings else None
        self.encoder = LEDEncoder(config, _embedding(config, tied))
        self.decoder = LEDDecoder(config, _embedding(config, tied))
        self.init_weights(self)

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        max_globals: int | None = None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """Runs the encoder under one mask for all layers, built by :meth:`LongformerMask.from_padding`.

        Given ``max_globals``, the most global tokens that a document may have, it compiles whole:
        ``torch.compile(model.led.encode, fullgraph=True)``, once for all lengths.

        Raises:
            ValueError: for ids as in :meth:`LEDEncoder.forward`, and masks of another shape than theirs.
        """
        check_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds, self.encoder)
        name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        check_mask("attention_mask", attention_mask, given, name)
        check_mask("global_attention_mask", global_attention_mask, given, name)
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
            if global_attention_mask is None:
                max_globals = max_globals or 0
        check_recordable("the number of global tokens is looked at", max_globals, "give max_globals")
        mask = LongformerMask.from_padding(attention_mask, global_attention_mask, max_globals)
        return self.encoder(input_ids, mask, inputs_embeds=inputs_embeds, record=record)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        max_globals: int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Seq2SeqModelOutput:
        """One teacher-forced pass.

        Args:
            input_ids: int ``[batch, source]``.
            attention_mask, global_attention_mask: ``[batch, source]``, as :meth:`LongformerMask.from_padding`
                takes them.
            decoder_input_ids: int ``[batch, target]``; default: ``input_ids``, shifted.
            decoder_attention_mask: ``[batch, target]``, nonzero for tokens.
            inputs_embeds, decoder_inputs_embeds: ``[batch, source or target, d_model]``, instead of ids.
            max_globals: the most global tokens that a document may have, as :meth:`encode` takes it.
            output_attentions: also return the probabilities, which the kernels never write: they are
                computed apart, and take ``batch * heads * source * (max_globals + attention_window + 1)``
                numbers per encoder layer.
            output_hidden_states: also return what each layer saw, and the results.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, for more tokens than positions,
                and for ids and embeddings both given or both missing.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "decoder_input_ids and decoder_inputs_embeds are both missing, and there are no input_ids "
                    "to shift; give one of them."
                )
            decoder_input_ids = self.shift_right(input_ids, "input_ids")
        keep = output_attentions or output_hidden_states
        encoder_record, decoder_record = (LayerRecord(), LayerRecord()) if keep else (None, None)
        encoded = self.encode(
            input_ids,
            attention_mask,
            global_attention_mask,
            inputs_embeds=inputs_embeds,
            max_globals=max_globals,
            record=encoder_record,
        )
        decoded = self.decoder(
            decoder_input_ids,
            self.decoder.cross_keys_values(encoded),
            inputs_embeds=decoder_inputs_embeds,
            cross_mask=None if attention_mask is None else padding_scores(attention_mask, encoded.dtype),
            attention_mask=decoder_attention_mask,
            record=decoder_record,
        )
        output = Seq2SeqModelOutput(last_hidden_state=decoded, encoder_last_hidden_state=encoded)
        if output_hidden_states:
            output.encoder_hidden_states = (*encoder_record.hidden_states, encoded)
            output.decoder_hidden_states = (*decoder_record.hidden_states, decoded)
        if output_attentions:
            output.encoder_attentions, output.encoder_global_attentions = encoder_attentions(encoder_record)
            output.decoder_attentions = decoder_attentions(decoder_record, decoder_attention_mask)
            output.cross_attentions = cross_attentions(decoder_record, encoded, attention_mask)
        return output


class LEDForConditionalGeneration(LEDPreTrainedModel):
    """LED with a language-modelling head: summaries, answers, translations.

    >>> model = LEDForConditionalGeneration.from_pretrained("allenai/led-base-16384")
    >>> summary_ids = model.generate(input_ids, global_attention_mask=global_mask, max_new_tokens=256)
    """

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_dict(vars(config))
        self.led = LEDModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.init_weights(self.lm_head)
        self.tie_weights()

    def tie_weights(self) -> None:
        super().tie_weights()
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.led.shared.weight

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        shared = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        rows = shared.num_embeddings
        if not self.config.tie_word_embeddings:
            self.lm_head.weight = resized(self.lm_head.weight, rows)
        self.lm_head.out_features = rows
        bias = self.final_logits_bias
        self.final_logits_bias = F.pad(bias, (0, rows - bias.shape[1]))  # a negative width cuts
        return shared

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        **inputs,
    ) -> Seq2SeqLMOutput:
        """Arguments of :meth:`LEDModel.forward`, and ``labels``: int ``[batch, target]``, -100 where no loss
        is wanted. The loss is their mean cross-entropy; shifted, they are the default decoder input."""
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.shift_right(labels, "labels")
        output = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            **inputs,
        )
        logits = self.logits(output.last_hidden_state)
        loss = None
        if labels is not None:
            check_targets("labels", labels, [tuple(logits.shape[:2])], logits, logits.shape[2])
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long())
        return Seq2SeqLMOutput(loss=loss, logits=logits, **output.shared())

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., d_model]`` of the decoder to ``[..., vocab_size]``."""
        return few_rows_linear(self.lm_head, hidden) + self.final_logits_bias

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Decoder input for teacher forcing, as transformers' collators ask for it: ``labels``, shifted."""
        return self.shift_right(labels, "labels")

    generate = generate


def _embedding(config: LEDConfig, weight: nn.Parameter | None = None) -> nn.Embedding:
    """A new table, or one that reads ``weight``."""
    table = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id, _weight=weight)
    if weight is not None:
        table.weight = weight
    return table


remember_code(
    LEDForConditionalGeneration,
    LEDDecoder,
    DecoderLayer,
    DecoderSelfAttention,
    CrossAttention,
    nn.ModuleList,
    nn.Embedding,
    nn.Linear,
    nn.LayerNorm,
)
