"""Defines the models for question answering and sequence classification, by heads on the decoder's states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_model.checks import check_id_shape, check_target_shape, check_targets
from led_model.config import LEDConfig
from led_model.modeling.model import LEDModelWithHead
from led_model.modeling.outputs import Seq2SeqQuestionAnsweringModelOutput, Seq2SeqSequenceClassifierOutput


class LEDForQuestionAnswering(LEDModelWithHead):
    """Finds where in the text an answer starts and ends, by two logits for every token of the decoder."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.init_weights(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        max_globals: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqQuestionAnsweringModelOutput:
        """Returns logits, and the loss if there are labels; the other arguments are :meth:`LEDModel.forward`'s.

        Args:
            start_positions, end_positions: int ``[batch]`` or ``[batch, 1]``; with both, the loss is the mean
                of their two cross-entropies. Positions past the end are left out of it; negative ones are 0.
        """
        output = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            global_attention_mask=global_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            max_globals=max_globals,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        start_logits, end_logits = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            starts = _position_loss("start_positions", start_logits, start_positions)
            loss = (starts + _position_loss("end_positions", end_logits, end_positions)) / 2
        return Seq2SeqQuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            **output.shared(),
        )


class ClassificationHead(nn.Module):
    """Maps ``[batch, d_model]`` to ``[batch, num_labels]`` through one hidden layer."""

    def __init__(self, config: LEDConfig) -> None:
        super().__init__()
        self.dropout = config.classifier_dropout
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = F.dropout(hidden, self.dropout, self.training)
        hidden = F.dropout(torch.tanh(self.dense(hidden)), self.dropout, self.training)
        return self.out_proj(hidden)


class LEDForSequenceClassification(LEDModelWithHead):
    """Gives a text one label, several labels or numbers, which are read off the decoder at its last eos token.

    It computes what the class of this name in transformers 4 does.
    """

    def __init__(self, config: LEDConfig) -> None:
        super().__init__(config)
        self.classification_head = ClassificationHead(config)
        self.init_weights(self.classification_head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        max_globals: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqSequenceClassifierOutput:
        """Returns logits, and the loss if ``labels`` are given; the other arguments are :meth:`LEDModel.forward`'s.

        Args:
            input_ids: int ``[batch, source]``, with as many eos tokens in every row; the decoder's input has
                the same length, and is by default ``input_ids``, shifted.
            labels: what ``config.problem_type`` says; where that is ``None``, ``num_labels == 1`` means
                ``"regression"`` (mean squared error; ``[batch]``), integers ``"single_label_classification"``
                (cross-entropy; ``[batch]``), and floats ``"multi_label_classification"`` (binary
                cross-entropy; ``[batch, num_labels]``).

        Raises:
            ValueError: when rows have no eos token, or different numbers of them, and for labels of another shape or
                kind.
        """
        check_id_shape("input_ids", input_ids)
        if self.config.eos_token_id is None:
            raise ValueError(
                "eos_token_id of the config is None; set it, for the class is read at the last one."
            )
        output = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            global_attention_mask=global_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            max_globals=max_globals,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.classification_head(self._at_last_eos(input_ids, output.last_hidden_state))
        loss = None if labels is None else self._loss(logits, labels)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **output.shared())

    def _at_last_eos(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        if hidden.shape[1] != input_ids.shape[1]:
            raise ValueError(
                f"the decoder has {hidden.shape[1]} tokens and input_ids {input_ids.shape[1]}; give as many, "
                "for the class is read where input_ids ends."
            )
        if len(hidden) == 0:  # a batch of no documents
            return hidden[:, -1]
        eos = self.config.eos_token_id
        is_eos = torch.isin(input_ids, torch.tensor(eos, device=input_ids.device))
        counts = is_eos.sum(1)
        if counts.min() == 0 or counts.min() != counts.max():
            raise ValueError(
                f"rows of input_ids have {int(counts.min())} to {int(counts.max())} eos tokens ({eos}); "
                "give every row the same number, one at least."
            )
        last = torch.where(is_eos, torch.arange(input_ids.shape[1], device=input_ids.device), -1).amax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind, (batch, num_labels) = self.config.problem_type, logits.shape
        if kind is None:
            numbers = isinstance(labels, Tensor) and labels.is_floating_point()
            kind = "multi_label_classification" if numbers else "single_label_classification"
            kind = "regression" if num_labels == 1 else kind
        if kind == "single_label_classification":
            check_targets("labels", labels, [(batch,), (batch, 1)], logits, num_labels)
            return F.cross_entropy(logits, labels.flatten().long())
        if kind not in ("regression", "multi_label_classification"):
            raise ValueError(
                f"problem_type is {kind!r}; give 'regression', 'single_label_classification' or "
                "'multi_label_classification'."
            )
        is_flat = kind == "regression" and num_labels == 1
        check_target_shape("labels", labels, [(batch,)] * is_flat + [(batch, num_labels)], logits)
        labels = labels if labels.is_floating_point() else labels.to(logits.dtype)
        if kind == "regression":
            return F.mse_loss(logits.view_as(labels), labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


def _position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    batch, past_end = logits.shape
    check_targets(name, positions, [(batch,), (batch, 1)], logits)
    return F.cross_entropy(logits, positions.flatten().long().clamp(0, past_end), ignore_index=past_end)
