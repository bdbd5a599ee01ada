"""Defines a Longformer-Encoder-Decoder: BART with banded and global attention in the encoder, and an LM head.

Its layers are post-norm, and encoder, decoder and head share one embedding table.
Longformer, https://arxiv.org/abs/2004.05150; BART, https://arxiv.org/abs/1910.13461.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels import LongformerMask
from led_kernels.gemv import few_rows_linear
from led_model.checkpoint.pretrained import LEDPreTrainedModel, resized
from led_model.checks import check_inputs, check_mask, check_targets, check_traceable
from led_model.config import LEDConfig
from led_model.generation.captured import allow_capture
from led_model.generation.generate import generate
from led_model.generation.generation_config import GenerationConfig
from led_model.masks import padding_scores
from led_model.modeling.attention import CrossAttention, DecoderSelfAttention
from led_model.modeling.decoder import LEDDecoder
from led_model.modeling.embedding import token_embedding
from led_model.modeling.encoder import LEDEncoder
from led_model.modeling.layers import DecoderLayer
from led_model.modeling.output_attentions import cross_attentions, decoder_attentions, encoder_attentions
from led_model.modeling.outputs import DecoderRecord, EncoderRecord, Seq2SeqLMOutput, Seq2SeqModelOutput


class LEDModel(LEDPreTrainedModel):
    """Consists of an encoder and a decoder over one embedding table (three, when the config does not tie them)."""

    base_prefix = ""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.shared = token_embedding(config)
        # Each stack has a module of its own: functional_call, which replaces weights by name for one call, cannot put
        # a module back that has two names.
        tied_to = self.shared if config.tie_word_embeddings else None
        self.encoder = LEDEncoder(config, token_embedding(config, tied_to))
        self.decoder = LEDDecoder(config, token_embedding(config, tied_to))
        self.init_weights(self)

    @property
    def base_model(self) -> LEDModel:
        """Returns this model."""
        return self

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        max_globals: int | None = None,
        record: EncoderRecord | None = None,
    ) -> Tensor:
        """Runs the encoder under one mask for all layers, built by :meth:`LongformerMask.from_padding`.

        Given ``max_globals``, the most global tokens that a document may have, it compiles whole:
        ``torch.compile(model.led.encode, fullgraph=True)``, once for all lengths.

        Raises:
            ValueError: for ids as in :meth:`LEDEncoder.forward`, and masks of another shape than theirs.
        """
        name, given = check_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds, self.encoder)
        check_mask("attention_mask", attention_mask, given, name)
        check_mask("global_attention_mask", global_attention_mask, given, name)
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
            if global_attention_mask is None:
                max_globals = max_globals or 0
        check_traceable("the number of global tokens is looked at", max_globals, "give max_globals")
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
        """Runs one teacher-forced pass.

        Args:
            input_ids: int ``[batch, source]``.
            attention_mask, global_attention_mask: ``[batch, source]``, as :meth:`LongformerMask.from_padding`
                takes them.
            decoder_input_ids: int ``[batch, target]``; default: ``input_ids``, shifted.
            decoder_attention_mask: ``[batch, target]``, nonzero for tokens.
            inputs_embeds, decoder_inputs_embeds: ``[batch, source or target, d_model]``, instead of ids.
            max_globals: the most global tokens that a document may have, as :meth:`encode` takes it.
            output_attentions: whether the attention probabilities are returned too. The kernels never write them: they
                are computed apart, and take ``batch * heads * source * (max_globals + attention_window + 1)``
                numbers per encoder layer.
            output_hidden_states: whether the input of every layer and the results are returned too.

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
        encoder_record, decoder_record = (EncoderRecord(), DecoderRecord()) if keep else (None, None)
        encoder_states = self.encode(
            input_ids,
            attention_mask,
            global_attention_mask,
            inputs_embeds=inputs_embeds,
            max_globals=max_globals,
            record=encoder_record,
        )
        decoder_states = self.decoder(
            decoder_input_ids,
            self.decoder.cross_keys_values(encoder_states),
            inputs_embeds=decoder_inputs_embeds,
            cross_mask=None
            if attention_mask is None
            else padding_scores(attention_mask, encoder_states.dtype),
            attention_mask=decoder_attention_mask,
            record=decoder_record,
        )
        output = Seq2SeqModelOutput(
            last_hidden_state=decoder_states, encoder_last_hidden_state=encoder_states
        )
        # Without a record, neither hidden states nor attentions were asked for.
        if encoder_record is None or decoder_record is None:
            return output
        if output_hidden_states:
            output.encoder_hidden_states = (*encoder_record.hidden_states, encoder_states)
            output.decoder_hidden_states = (*decoder_record.hidden_states, decoder_states)
        if output_attentions:
            output.encoder_attentions, output.encoder_global_attentions = encoder_attentions(encoder_record)
            output.decoder_attentions = decoder_attentions(decoder_record, decoder_attention_mask)
            output.cross_attentions = cross_attentions(decoder_record, encoder_states, attention_mask)
        return output


class LEDModelWithHead(LEDPreTrainedModel):
    """Holds a model under a head, as ``led``; the models with a head derive from it."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.led = LEDModel(config)

    @property
    def base_model(self) -> LEDModel:
        """Returns the model under the head."""
        return self.led


class LEDForConditionalGeneration(LEDModelWithHead):
    """LED with a language-modeling head, which writes summaries, answers or translations.

    >>> model = LEDForConditionalGeneration.from_pretrained("allenai/led-base-16384")
    >>> summary_ids = model.generate(input_ids, global_attention_mask=global_mask, max_new_tokens=256)
    """

    final_logits_bias: Tensor

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_dict(vars(config))
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
        self.final_logits_bias = F.pad(bias, (0, rows - bias.shape[1]))  # a negative width cuts rows off
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
        """Returns logits, and the loss if ``labels`` are given; the other arguments are :meth:`LEDModel.forward`'s.

        Args:
            labels: int ``[batch, target]``, -100 where no loss is wanted. The loss is their mean cross-entropy;
                shifted, they are the default decoder input.
        """
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
        """Returns ``[..., vocab_size]`` for the decoder's ``[..., d_model]``."""
        return few_rows_linear(self.lm_head, hidden) + self.final_logits_bias

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Returns the decoder input for teacher forcing, ``labels`` shifted: transformers' collators call it."""
        return self.shift_right(labels, "labels")

    generate = generate


allow_capture(
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
