"""Defines the tasks of models that write summaries, or answers in their own words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from led_model.batch.documents import Document
from led_model.batch.pieces import Piece
from led_model.batch.tasks import Result, Task
from led_model.masks import key_mask
from led_model.modeling.model import LEDForConditionalGeneration
from led_model.overflow import check_finite
from led_model.terminal import log, no_bars, quiet
from led_model.tokenization.batch_encoding import BatchEncoding
from led_model.tokenization.tokenizer import LEDTokenizer

SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "seed")


class _Writer(Task[LEDForConditionalGeneration]):
    """Writes a text, which becomes the entry ``field`` of a line of the output.

    With ``compares`` each of a document's pieces gets a ``score``, by which the best is chosen.
    """

    field: str
    writes = True
    # Each of some 170 tokens takes a pass over the decoder's weights, in led-base as long as reading 12 tokens.
    batch_cost = 2048
    compares = False

    def __init__(
        self, model: LEDForConditionalGeneration, tokenizer: LEDTokenizer, settings: Result, **reading: Any
    ) -> None:
        super().__init__(model, tokenizer, **reading)
        self.settings = settings | {"num_return_sequences": 1}
        generation = model.generation_config.updated(**self.settings)
        generation.check(model.config.vocab_size)  # fails before a long text is read
        if not generation.do_sample and (idle := [name for name in SAMPLING_FLAGS if name in settings]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise ValueError(f"{flags} would change nothing; give --do-sample too, or leave it out.")
        self.has_beams = generation.num_beams > 1
        self.limit = generation.max_sequence_length() - 1
        if self.limit > (positions := model.config.max_decoder_position_embeddings):
            raise ValueError(
                f"{self.limit:,} new tokens are asked for but the decoder has {positions:,} positions; give "
                f"--max-new-tokens of at most {positions}."
            )
        if generation.unsupported:
            log(f"the checkpoint asks for {generation.describe_unsupported()}; decoding without it.")

    def _run(self, pieces: Sequence[Piece], inputs: BatchEncoding) -> list[Result]:
        model, start = self.model, time.perf_counter()
        with self.read(inputs):
            encoder_hidden_states = model.led.encode(**inputs)
            check_finite(encoder_hidden_states, model.dtype)
        read = time.perf_counter()
        streamer = self.streamer if self._is_result(pieces[0]) else None
        by_token = streamer is not None and len(pieces) == 1 and not self.has_beams
        no_bar = True if by_token else no_bars()
        with tqdm(total=self.limit, desc="writing", unit="token", leave=False, disable=no_bar) as bar:
            on_token = None if bar.disable else lambda _: bar.update()
            tokens = model.generate(
                inputs.input_ids,
                inputs.attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                on_token=on_token,
                streamer=streamer if by_token else None,
                **self.settings,
            )
            assert isinstance(tokens, Tensor)  # which is what generate returns unless asked for scores
            sequences = tokens.tolist()
        written = time.perf_counter()
        pad = self.reader.tokenizer.pad_token_id
        self.work.read_seconds += read - start
        self.work.written_seconds += written - read
        self.work.written_tokens += sum(token != pad for row in sequences for token in row[1:])
        texts = [
            text.strip() for text in self.reader.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        ]
        if streamer is not None and not by_token:
            streamer.lines(texts)
        scores: list[float | None] = [None] * len(texts)
        if self.compares and any(piece.count > 1 for piece in pieces):
            scores = mean_log_probs(
                model, encoder_hidden_states, inputs.attention_mask, torch.tensor(sequences)
            ).tolist()
        return [{self.field: text, "score": score} for text, score in zip(texts, scores, strict=True)]

    def _is_result(self, piece: Piece) -> bool:
        """Returns whether what is written from a piece is a line of its document's result."""
        return piece.count == 1 or not self.compares


class Summarizer(_Writer):
    """Writes a summary of each piece and joins those of a document in order, a line each.

    With ``condense`` the joined summaries are read as a document of their own, and so on until one summary is left. If
    they make no fewer pieces than they were made of, they stay joined.
    """

    field = "summary"

    def __init__(self, *args: Any, condense: bool = False, **reading: Any) -> None:
        super().__init__(*args, **reading)
        self.condense = condense

    def join(self, document: Document, found: Sequence[Result]) -> Result:
        joined = "\n".join(piece["summary"] for piece in found)
        if not self.condense or len(found) == 1 or not joined.strip():
            return {"summary": joined}
        with quiet():  # the message below says how they are read
            pieces = self.reader.pieces(Document(document.id, document.source, joined, 0))
        if len(pieces) >= len(found):
            log(f"{document.name}: the summaries of its pieces are no shorter than these, and are joined.")
            return {"summary": joined}
        log(
            f"{document.name}: summarizing {len(found)} summaries, in {len(pieces)} piece{'s' * (len(pieces) > 1)}."
        )
        return self.join(document, [result for piece in pieces for result in self.run([piece])])

    def _is_result(self, piece: Piece) -> bool:
        return piece.count == 1 or not self.condense


class Answerer(_Writer):
    """Writes an answer from each piece and takes that one for a document's whose tokens are likeliest on average."""

    field = "answer"
    compares = True

    def join(self, document: Document, found: Sequence[Result]) -> Result:
        asked = {"question": self.reader.question}
        if len(found) == 1:
            return asked | {"answer": found[0]["answer"]}
        return asked | max(found, key=lambda piece: piece["score"])


def mean_log_probs(
    model: LEDForConditionalGeneration,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    sequences: Tensor,
) -> Tensor:
    """Returns the mean log-probability of each sequence's tokens up to its end, float32 ``[batch]``.

    ``sequences`` is int64 ``[batch, length]``.
    """
    sequences = sequences.to(encoder_hidden_states.device)
    decoder = model.led.decoder
    cross_mask = key_mask(attention_mask)
    hidden = decoder(
        sequences[:, :-1], decoder.cross_keys_values(encoder_hidden_states), cross_mask=cross_mask
    )
    targets = sequences[:, 1:]
    logits = model.logits(hidden).float()
    log_probs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    ends = torch.isin(targets, torch.tensor(model.generation_config.eos_token_ids, device=targets.device))
    counts = ends.cumsum(1) - ends.long() == 0  # bool [batch, length - 1], up to the first end
    return (log_probs * counts).sum(1) / counts.sum(1)
