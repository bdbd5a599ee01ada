"""Defines what the commands do with a batch of pieces: find a span, give a class, or write (``writers.py``)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from led_model.batch.documents import Document
from led_model.batch.pieces import Piece, Reader
from led_model.batch.streaming import TextStreamer
from led_model.checkpoint.pretrained import LEDPreTrainedModel
from led_model.config import LEDConfig
from led_model.modeling.heads import LEDForQuestionAnswering, LEDForSequenceClassification
from led_model.overflow import check_finite
from led_model.terminal import layer_progress, seconds
from led_model.tokenization.batch_encoding import BatchEncoding
from led_model.tokenization.tokenizer import LEDTokenizer

Model = TypeVar("Model", bound=LEDPreTrainedModel)
Result = dict[str, Any]  # what a model gives for a piece, or for a document


@dataclass
class Work:
    """Counts tokens read and written so far, and the seconds that took; ``padded_tokens`` are read and padding."""

    read_tokens: int = 0
    padded_tokens: int = 0
    read_seconds: float = 0.0
    written_tokens: int = 0
    written_seconds: float = 0.0

    def __str__(self) -> str:
        text = f"read {self.read_tokens:,} tokens in {seconds(self.read_seconds)}"
        if self.written_seconds:
            speed = self.written_tokens / self.written_seconds
            text += (
                f", wrote {self.written_tokens:,} in {seconds(self.written_seconds)} ({speed:.1f} tokens/s)"
            )
        return text


def longest_input(config: LEDConfig, writes: bool) -> int:
    """Returns how many tokens the model reads; under a head the decoder reads as many as the encoder."""
    positions = config.max_encoder_position_embeddings
    return positions if writes else min(positions, config.max_decoder_position_embeddings)


def check_vocabulary(tokenizer: LEDTokenizer, config: LEDConfig) -> None:
    """Checks that a model has an embedding for every token.

    Raises:
        ValueError: when it has not.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {config.vocab_size:,}; use "
            "the tokenizer that belongs to the checkpoint."
        )


class Task(ABC, Generic[Model]):
    """Runs a model over pieces of documents.

    ``streamer``, if there is one, prints what it writes, where that is the result as it stands.
    """

    writes = False
    batch_cost = 256
    """What a batch costs beside its tokens, in tokens: so many could be read in that time."""
    streamer: TextStreamer | None = None

    def __init__(self, model: Model, tokenizer: LEDTokenizer, **reading: Any) -> None:
        """Checks that the model is sound and that the tokenizer fits it, and prepares a :class:`Reader`.

        Args:
            reading: the other fields of :class:`Reader`.
        """
        check_weights(model)
        self.model = model
        self.device = next(model.parameters()).device
        check_vocabulary(tokenizer, model.config)
        longest = longest_input(model.config, self.writes)
        if longest < model.config.max_encoder_position_embeddings:
            reading["bound_by"] = ", the positions of its decoder, which the head sits on"
        self.reader = Reader(tokenizer, longest, **reading)
        self.work = Work()

    def run(self, pieces: Sequence[Piece]) -> list[Result]:
        """Reads a batch, and returns a result for each piece."""
        inputs = self.reader.batch(pieces, self.device)
        with torch.no_grad():
            found = self._run(pieces, inputs)
        self.work.read_tokens += int(inputs.attention_mask.sum())
        self.work.padded_tokens += inputs.attention_mask.numel()
        return found

    def read(self, inputs: BatchEncoding) -> AbstractContextManager[None]:
        """Draws a progress bar over the encoder's layers within the block."""
        return layer_progress(
            self.model.base_model.encoder.layers, f"reading {inputs.input_ids.numel():,} tokens"
        )

    @abstractmethod
    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        """Returns a result for each piece, of ``inputs`` that are their batch."""

    @abstractmethod
    def join(self, document: Document, found: Sequence[Result]) -> Result:
        """Returns a document's result, from those of its pieces in order."""


class SpanFinder(Task[LEDForQuestionAnswering]):
    """Finds the answer in the text, at most ``longest_answer`` tokens of it: start and end with the most logits."""

    def __init__(
        self, model: LEDForQuestionAnswering, tokenizer: LEDTokenizer, longest_answer: int, **reading: Any
    ) -> None:
        super().__init__(model, tokenizer, **reading)
        self.longest_answer = longest_answer

    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        start = time.perf_counter()
        with self.read(inputs):
            output = self.model(**inputs)
            start_logits, end_logits = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            check_finite(start_logits + end_logits, self.model.dtype)
        self.work.read_seconds += time.perf_counter() - start
        found = []
        for row, piece in enumerate(pieces):
            own = slice(piece.first, piece.first + len(piece.offsets))
            first, last, score = best_span(start_logits[row, own], end_logits[row, own], self.longest_answer)
            begin, end = int(piece.offsets[first][0]), int(piece.offsets[last][1])
            answer = piece.document.text[begin:end].rstrip()  # the last token may be a space
            found.append({"answer": answer, "score": score, "start": begin, "end": begin + len(answer)})
        return found

    def join(self, document: Document, found: Sequence[Result]) -> Result:
        return {"question": self.reader.question} | max(found, key=lambda piece: piece["score"])


class Classifier(Task[LEDForSequenceClassification]):
    """Gives probabilities of labels.

    A document's logits, which up to a constant are its log-probabilities, are the mean of its pieces'.
    """

    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        start = time.perf_counter()
        with self.read(inputs):
            logits = self.model(**inputs).logits.float().cpu()
            check_finite(logits, self.model.dtype)
        self.work.read_seconds += time.perf_counter() - start
        return [{"logits": row} for row in logits]

    @property
    def labels(self) -> list[str]:
        """Returns the names of the labels, in the order of the logits."""
        config = self.model.config
        return [(config.id2label or {}).get(i, f"LABEL_{i}") for i in range(config.num_labels)]

    @property
    def is_regression(self) -> bool:
        """Returns whether the model gives numbers, and no probabilities."""
        return self.model.config.problem_type == "regression" or self.model.config.num_labels == 1

    @property
    def gives_several(self) -> bool:
        """Returns whether several labels may apply to a document, or none."""
        return self.model.config.problem_type == "multi_label_classification"

    def join(self, document: Document, found: Sequence[Result]) -> Result:
        logits = torch.stack([piece["logits"] for piece in found]).mean(0)
        if self.is_regression:
            return {"label": dict(zip(self.labels, logits.tolist(), strict=True))}
        probabilities = logits.sigmoid() if self.gives_several else logits.softmax(-1)
        by_label = dict(zip(self.labels, probabilities.tolist(), strict=True))
        label: Any = max(by_label, key=lambda name: by_label[name])
        if self.gives_several:
            label = [name for name, probability in by_label.items() if probability >= 0.5]
        return {"label": label, "probabilities": by_label}


def as_text(result: Result) -> str:
    """Returns a document's result for people: what was written or found, or labels with their numbers, a line each."""
    if "label" not in result:
        return result["answer"] if "answer" in result else result["summary"]
    numbers = result.get("probabilities") or result["label"]
    ranked = sorted(numbers.items(), key=lambda item: -item[1])
    return "\n".join(f"{label}\t{number:.4f}" for label, number in ranked)


def check_weights(model: nn.Module) -> None:
    """Checks that no weight is NaN or infinite, as every result would be made of it.

    Raises:
        ValueError: naming such a weight.
    """
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        four_bits = getattr(weight, "quant_state", None)
        values = weight.data if four_bits is None else four_bits.absmax  # the largest magnitude of each block
        if type(values) is not Tensor:  # torchao's int8 weights are tensors of a class of their own
            values = values.dequantize()
        # A bias of -inf forbids a token.
        forbids = values.isneginf() if name == "final_logits_bias" else False
        if values.is_floating_point() and not bool((values.isfinite() | forbids).all()):
            raise ValueError(f"the model's {name} holds NaN or infinity; give a sound checkpoint.")


def best_span(start_logits: Tensor, end_logits: Tensor, longest: int) -> tuple[int, int, float]:
    """Returns the first token, the last token and the score of the best span of 1 to ``longest`` tokens.

    The logits are float ``[n]``; a score is the sum of the two at the ends of a span.
    """
    longest = min(longest, len(end_logits))
    ends = torch.nn.functional.pad(end_logits, (0, longest - 1), value=float("-inf")).unfold(0, longest, 1)
    score, best = (start_logits[:, None] + ends).flatten().max(0)  # [n, longest]: start, tokens after it
    first, after = divmod(int(best), longest)
    return first, first + after, float(score)
