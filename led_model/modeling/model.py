"""Defines a Longformer-Encoder-Decoder: BART with banded and global attention in the encoder, and an LM head.

Its layers are post-norm, and encoder, decoder and head share one embedding table.
Longformer, https://arxiv.org/abs/2004.05150; BART, https://arxiv.org/abs/1910.13461.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.distributed.split_keys import SplitKeys
from led_kernels.gemv import few_rows_linear
from led_kernels.loss import vocabulary_loss
from led_kernels.processes import unsharded
from led_kernels.trainer import AcceptsNumItems
from led_model.checkpoint.pretrained import LEDPreTrainedModel, resized
from led_model.checks import check_inputs, check_return_dict, check_targets
from led_model.config import LEDConfig
from led_model.generation.captured import allow_capture
from led_model.generation.generate import generate
from led_model.generation.generation_config import GenerationConfig
from led_model.masks import encoder_mask, padding_scores
from led_model.modeling.attention import CrossAttention, DecoderSelfAttention
from led_model.modeling.decoder import LEDDecoder
from led_model.modeling.embedding import token_embedding
from led_model.modeling.encoder import LEDEncoder
from led_model.modeling.layers import DecoderLayer
from led_model.modeling.output_attentions import cross_attentions, decoder_attentions, encoder_attentions
from led_model.modeling.outputs import DecoderRecord, EncoderRecord, Seq2SeqLMOutput, Seq2SeqModelOutput
from led_model.packing import PackedTargets, check_packing, packed_inputs


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
        cu_seqlens: Tensor | None = None,
        max_globals: int | None = None,
        record: EncoderRecord | None = None,
    ) -> Tensor:
        """Runs the encoder under one mask for all layers, built by :meth:`LongformerMask.from_padding`.

        With ``cu_seqlens``, int ``[batch + 1]``, documents are packed: ids and masks are ``[total]``, and the result is
        ``[total, d_model]``.

        Given ``max_globals``, the most global tokens that a document may have, it compiles whole:
        ``torch.compile(model.led.encode, fullgraph=True)``, once for all lengths.

        Raises:
            ValueError: for ids as in :meth:`LEDEncoder.forward`, and masks of another shape than theirs.
        """
        if cu_seqlens is None:
            name, given = check_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds, self.encoder)
        else:
            name, given = packed_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds)
        mask = encoder_mask(name, given, attention_mask, global_attention_mask, cu_seqlens, max_globals)
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
        cu_seqlens: Tensor | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        max_globals: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Runs one teacher-forced pass.

        Args:
            input_ids: int ``[batch, source]``.
            attention_mask, global_attention_mask: ``[batch, source]``, as :meth:`LongformerMask.from_padding`
                takes them.
            decoder_input_ids: int ``[batch, target]``; default: ``input_ids``, shifted.
            decoder_attention_mask: ``[batch, target]``, nonzero for tokens.
            inputs_embeds, decoder_inputs_embeds: ``[batch, source or target, d_model]``, instead of ids.
            cu_seqlens, decoder_cu_seqlens: int ``[batch + 1]``, 0 and then the running total of the lengths of
                documents and of targets that are packed, stored one after another without padding. Ids and
                ``global_attention_mask`` are ``[total]`` then, embeddings and results ``[total, d_model]``, and no
                other mask is given.
            max_globals: the most global tokens that a document may have, as :meth:`encode` takes it.
            output_attentions: whether the attention probabilities are returned too. The kernels never write them: they
                are computed apart, and take ``batch * heads * source * (max_globals + attention_window + 1)``
                numbers per encoder layer.
            output_hidden_states: whether the input of every layer and the results are returned too.
            return_dict: for transformers' callers; :meth:`Seq2SeqOutput.to_tuple` makes a tuple.

        Raises:
            ValueError: for ids of another shape or outside the vocabulary, for more tokens than positions,
                and for ids and embeddings both given or both missing.
        """
        check_return_dict(return_dict)
        keep = output_attentions or output_hidden_states
        check_packing(cu_seqlens, decoder_cu_seqlens, decoder_attention_mask, keep)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "decoder_input_ids and decoder_inputs_embeds are both missing, and there are no input_ids "
                    "to shift; give one of them."
                )
            if decoder_cu_seqlens is not None:
                raise ValueError(
                    "decoder_cu_seqlens is given and the decoder's input is not; give both, or neither."
                )
            decoder_input_ids = self.shift_right(input_ids, "input_ids", cu_seqlens)
            decoder_cu_seqlens = cu_seqlens
        elif cu_seqlens is not None and decoder_cu_seqlens is None:
            raise ValueError(
                "cu_seqlens is given and decoder_cu_seqlens is not; pack the decoder's input, too."
            )
        packing = None
        if cu_seqlens is not None and decoder_cu_seqlens is not None:
            sources = packed_inputs("input_ids", input_ids, "inputs_embeds", inputs_embeds)
            targets = packed_inputs(
                "decoder_input_ids", decoder_input_ids, "decoder_inputs_embeds", decoder_inputs_embeds
            )
            packing = PackedTargets.of(cu_seqlens, sources, decoder_cu_seqlens, targets)
        context = self.encoder.context
        if keep and context is not None:
            raise ValueError(
                "output_attentions and output_hidden_states are not served where documents are split over ranks; "
                "leave them out."
            )
        encoder_record, decoder_record = (EncoderRecord(), DecoderRecord()) if keep else (None, None)
        encoder_states = self.encode(
            input_ids,
            attention_mask,
            global_attention_mask,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            max_globals=max_globals,
            record=encoder_record,
        )
        cross_mask: Tensor | SplitKeys | None = None
        if context is not None:
            cross_mask = SplitKeys.of_part(attention_mask, encoder_states, context.group)
        elif attention_mask is not None:
            cross_mask = padding_scores(attention_mask, encoder_states.dtype)
        decoder_states = self.decoder(
            decoder_input_ids,
            encoder_hidden_states=encoder_states,
            inputs_embeds=decoder_inputs_embeds,
            cross_mask=cross_mask,
            attention_mask=decoder_attention_mask,
            record=decoder_record,
            packing=packing,
        )
        recorded: dict[str, Any] = {}
        if encoder_record is not None and decoder_record is not None:
            if output_hidden_states:
                recorded["encoder_hidden_states"] = (*encoder_record.hidden_states, encoder_states)
                recorded["decoder_hidden_states"] = (*decoder_record.hidden_states, decoder_states)
            if output_attentions:
                with unsharded(self):  # which uses weights of layers outside of their forwards
                    local, of_globals = encoder_attentions(encoder_record)
                    recorded["encoder_attentions"], recorded["encoder_global_attentions"] = local, of_globals
                    recorded["decoder_attentions"] = decoder_attentions(
                        decoder_record, decoder_attention_mask
                    )
                    recorded["cross_attentions"] = cross_attentions(
                        decoder_record, encoder_states, attention_mask
                    )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_states, encoder_last_hidden_state=encoder_states, **recorded
        )


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
    accepts_loss_kwargs = AcceptsNumItems()  # pyrefly: ignore[bad-override]

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self._generation_config = GenerationConfig.from_dict(vars(config))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.init_weights(self.lm_head)
        self.tie_weights()

    @property
    def generation_config(self) -> GenerationConfig:
        """Returns how :meth:`generate` chooses tokens; transformers' class of this name may be set, too."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        if not isinstance(settings, GenerationConfig):
            settings = GenerationConfig.from_dict(vars(self.config)).replaced_by(settings)
        self._generation_config = settings

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
        num_items_in_batch: Tensor | int | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        max_globals: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Returns logits, and the loss if ``labels`` are given; the other arguments are :meth:`LEDModel.forward`'s.

        Args:
            labels: int ``[batch, target]``, or ``[total]`` when packed, -100 where no loss is wanted. The loss
                is their mean cross-entropy; shifted, they are the default decoder input.
            num_items_in_batch: what the sum of the cross-entropies is divided by, in place of the number of labels
                here: that of all batches whose gradients are added.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.shift_right(labels, "labels", decoder_cu_seqlens)
        output = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            global_attention_mask=global_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            cu_seqlens=cu_seqlens,
            decoder_cu_seqlens=decoder_cu_seqlens,
            max_globals=max_globals,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        hidden, loss = output.last_hidden_state, None
        if labels is None:
            logits = self.logits(hidden)
        else:
            check_targets(
                "labels", labels, [tuple(hidden.shape[:-1])], hidden, self.final_logits_bias.shape[1]
            )
            loss, logits = vocabulary_loss(
                hidden, self.lm_head, self.final_logits_bias, labels, num_items_in_batch
            )
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
