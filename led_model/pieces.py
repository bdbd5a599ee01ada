"""Turns a document into what the encoder can read: whole, cut short, or in pieces."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import device as Device

from led_model.batch_encoding import BatchEncoding
from led_model.documents import BETWEEN_PARTS, Document
from led_model.terminal import say
from led_model.tokenizer import LEDTokenizer

# ends of what is best not torn apart, the best places first
_BOUNDARIES = [re.compile(p) for p in (r"\n\s*\n", r"[.!?][\"'”’)\]]*\s+", r"\n\s*", r"\s+")]


@dataclass
class Piece:
    """A part of a document as the model reads it.

    ``input_ids`` with special tokens; the first ``num_globals`` are global; ``first`` is where the document's
    own tokens begin, each with its characters in ``offsets``. It is number ``index`` of ``count``.
    """

    document: Document
    input_ids: list[int]
    num_globals: int
    first: int
    offsets: Sequence[tuple[int, int]]
    index: int
    count: int


@dataclass
class Reader:
    """Makes pieces of at most ``limit`` tokens, special tokens and question included.

    ``long`` says what becomes of a longer document: "error", "truncate" or "chunk". With a question the ids are
    ``<s> question </s></s> document </s>``, and the tokens up to the first ``</s>`` are global; otherwise
    ``<s> document </s>``, and the first ``global_tokens`` are. Between the parts of a document stands the
    tokenizer's ``<doc-sep>``, which is global too, or a blank line if the tokenizer has none.

    Raises:
        ValueError: when the question leaves no room.
    """

    tokenizer: LEDTokenizer
    limit: int
    long: str = "error"
    global_tokens: int = 1
    question: str | None = None

    def __post_init__(self) -> None:
        bos, eos = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        self._prefix, self._suffix = [bos], [eos]
        if self.question is not None:
            question = self._encode(self.question).input_ids
            self._prefix, self.global_tokens = [bos, *question, eos, eos], 1 + len(question)
        if self._room < 1:
            raise ValueError(
                f"--question takes {len(self._prefix)} of the {self.limit:,} tokens that the model reads; "
                "ask a shorter one."
            )

    @property
    def _room(self) -> int:
        return self.limit - len(self._prefix) - len(self._suffix)

    def pieces(self, document: Document) -> list[Piece]:
        """The whole document, its beginning, or all of it in order.

        Raises:
            ValueError: when the document is too long and ``long`` is "error".
        """
        ids, offsets = self._encode_document(document)
        spans = [(0, len(ids))]
        if len(ids) > self._room:
            total = len(ids) + len(self._prefix) + len(self._suffix)
            if self.long == "error":
                raise ValueError(
                    f"{document.name} has {total:,} tokens but the model reads at most {self.limit:,}; cut it, or "
                    "let --long truncate or --long chunk do so."
                )
            if self.long == "truncate":
                say(f"{document.name}: reading the first {self.limit:,} of {total:,} tokens.")
                spans = [(0, self._room)]
            else:
                spans = split(document.text, offsets, self._room)
                say(f"{document.name}: reading {total:,} tokens in {len(spans)} pieces.")
        return [
            Piece(
                document,
                [*self._prefix, *ids[start:stop], *self._suffix],
                self.global_tokens,
                len(self._prefix),
                offsets[start:stop],
                index,
                len(spans),
            )
            for index, (start, stop) in enumerate(spans)
        ]

    def batch(self, pieces: Sequence[Piece], device: str | Device) -> BatchEncoding:
        """``input_ids``, ``attention_mask`` and ``global_attention_mask``, padded to the right."""
        rows = []
        for piece in pieces:
            separator = self.tokenizer.doc_sep_token_id
            global_attention_mask = [
                int(index < piece.num_globals or token == separator)
                for index, token in enumerate(piece.input_ids)
            ]
            rows.append({"input_ids": piece.input_ids, "global_attention_mask": global_attention_mask})
        return self.tokenizer.pad(rows, return_tensors="pt").to(device)

    def _encode_document(self, document: Document) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, its characters in ``document.text``."""
        separator = self.tokenizer.doc_sep_token_id
        if not document.parts or separator is None:
            encoded = self._encode(document.text)
            return encoded.input_ids, encoded.offset_mapping
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0  # of the part, in the text
        for part in document.parts:
            if begin:
                ids.append(separator)
                offsets.append((begin - len(BETWEEN_PARTS), begin))
            encoded = self._encode(part)
            ids += encoded.input_ids
            offsets += [(begin + first, begin + end) for first, end in encoded.offset_mapping]
            begin += len(part) + len(BETWEEN_PARTS)
        return ids, offsets

    def _encode(self, text: str) -> BatchEncoding:
        # `</s>` in a document is text, not its end
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )


def split(text: str, offsets: Sequence[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Token ranges of at most ``room``, one after another over all tokens.

    Each ends in its last quarter, after a paragraph if one ends there, else after a sentence, a line or a word,
    the last of its kind, and else when it is full. ``offsets`` are the tokens' characters in ``text``.
    """
    starts = [start for start, _ in offsets]
    spans = []
    begin = 0
    while begin < len(offsets):
        full = begin + room
        stop = len(offsets) if full >= len(offsets) else _boundary(text, starts, full - room // 4, full)
        spans.append((begin, stop))
        begin = stop
    return spans


def _boundary(text: str, starts: Sequence[int], earliest: int, full: int) -> int:
    """The token before which to cut: after ``earliest``, at the latest ``full``."""
    low, high = starts[earliest], starts[full]
    for pattern in _BOUNDARIES:
        for match in reversed(list(pattern.finditer(text, low, high))):
            token = bisect_left(starts, match.end(), earliest, full)
            if earliest < token <= full:
                return token
    return full
