"""Turns a document into what the encoder can read: whole, cut short, or in pieces."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import device as Device

from led_model.batch.documents import BETWEEN_PARTS, Document
from led_model.terminal import log
from led_model.tokenization.batch_encoding import BatchEncoding
from led_model.tokenization.tokenizer import LEDTokenizer

_WINDOW = 2**18  # characters that are encoded at once

# A text is cut after the matches of these patterns, of which the first finds the best places.
_BOUNDARIES = [re.compile(p) for p in (r"\n\s*\n", r"[.!?][\"'”’)\]]*\s+", r"\n\s*", r"\s+")]


@dataclass
class Piece:
    """Holds a part of a document as the model reads it.

    ``ids`` are the document's own, each with its characters in ``offsets``; what stands around them is in
    ``input_ids``, whose first ``num_globals`` are global. It is number ``index`` of ``count``.
    """

    document: Document
    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int32 [tokens, 2]
    prefix: list[int]
    suffix: list[int]
    num_globals: int
    index: int
    count: int
    tokens: int  # how many the document has, as far as it was read
    is_truncated: bool

    @property
    def input_ids(self) -> list[int]:
        """Returns all ids that the model reads, made at each call, as a list takes several times the memory."""
        return [*self.prefix, *self.ids.tolist(), *self.suffix]

    @property
    def length(self) -> int:
        """Returns how many ids the model reads."""
        return len(self.prefix) + len(self.ids) + len(self.suffix)

    @property
    def first(self) -> int:
        """Returns the index in ``input_ids`` at which the document's own tokens begin."""
        return len(self.prefix)


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
    bound_by: str = ""  # what sets the limit, a clause of messages
    question_name: str = "--question"  # what messages call the question

    def __post_init__(self) -> None:
        bos, eos = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        self._prefix, self._suffix = [bos], [eos]
        if self.question is not None:
            question = self._encode(self.question).input_ids
            self._prefix, self.global_tokens = [bos, *question, eos, eos], 1 + len(question)
        if self._room < 1 and self.question is None:
            raise ValueError(
                f"the model reads {self.limit:,} tokens{self.bound_by}, which leaves no room for a text between the "
                "special ones; give a checkpoint with more positions."
            )
        if self._room < 1:
            raise ValueError(
                f"{self.question_name} takes {len(self._prefix)} of the {self.limit:,} tokens that the model reads; "
                "ask a shorter one."
            )

    @property
    def _room(self) -> int:
        """Returns the number of a document's own tokens that fit into a piece."""
        return self.limit - len(self._prefix) - len(self._suffix)

    def pieces(self, document: Document) -> list[Piece]:
        """Returns the whole document as one piece, its beginning as one, or all of it in several, in order.

        Raises:
            ValueError: when the document is too long and ``long`` is "error".
        """
        special = len(self._prefix) + len(self._suffix)
        enough = None if self.long == "chunk" else self._room + 1
        ids, offsets, is_all = self._tokens(document, enough)
        if len(ids) == 0:
            raise ValueError(
                f"{document.name} holds no character that the tokenizer knows; give another text."
            )
        spans, is_truncated = [(0, len(ids))], False
        if len(ids) > self._room:
            total = f"{len(ids) + special:,}" if is_all else f"more than {self.limit:,}"
            if self.long == "error":
                raise ValueError(
                    f"{document.name} has {total} tokens but the model reads at most {self.limit:,}"
                    f"{self.bound_by}; cut it, or let --long truncate or --long chunk do so."
                )
            if self.long == "truncate":
                log(f"{document.name}: reading the first {self.limit:,} of {total} tokens.")
                spans, is_truncated = [(0, self._room)], True
            else:
                spans = split(document.text, offsets, self._room)
                log(f"{document.name}: reading {total} tokens in {len(spans)} pieces.")
        return [
            Piece(
                document,
                ids[start:stop],
                offsets[start:stop],
                self._prefix,
                self._suffix,
                self.global_tokens,
                index,
                len(spans),
                spans[-1][1],
                is_truncated,
            )
            for index, (start, stop) in enumerate(spans)
        ]

    def count(self, document: Document) -> int:
        """Returns how many tokens the whole document has, special ones included, without keeping them."""
        own = sum(len(ids) for ids, _, _ in self._windows(document))
        return len(self._prefix) + own + len(self._suffix)

    def _tokens(self, document: Document, enough: int | None) -> tuple[np.ndarray, np.ndarray, bool]:
        """Returns at least ``enough`` of a document's tokens if there are as many, else all.

        Returns:
            the ids, int32 ``[tokens]``, their characters, int32 ``[tokens, 2]``, and whether they are all.
        """
        ids, offsets, count, is_all = [np.empty(0, np.int32)], [np.empty((0, 2), np.int32)], 0, True
        for own_ids, own_offsets, is_last in self._windows(document):
            ids.append(np.array(own_ids, np.int32))
            offsets.append(own_offsets)
            count += len(own_ids)
            if enough is not None and count >= enough:
                is_all = is_last
                break
        return np.concatenate(ids), np.concatenate(offsets), is_all

    def _windows(self, document: Document) -> Iterator[tuple[list[int], np.ndarray, bool]]:
        """Yields the ids of one window of the document after another, their characters, and whether it is the last.

        The tokenizer takes 165 bytes of memory a byte of text, which windows bound.
        """
        separator = self.tokenizer.doc_sep_token_id
        parts = document.parts if separator is not None and document.parts else (document.text,)
        first = 0  # the index in the whole text of the part's first character
        for part in parts:
            if first:
                assert separator is not None  # without one there is a single part
                yield [separator], np.array([[first - len(BETWEEN_PARTS), first]], np.int32), False
            begin = 0
            while begin < len(part):
                end = _end_of_window(part, begin)
                encoded = self._encode(part[begin:end])
                offsets = np.array(encoded.offset_mapping, np.int32).reshape(-1, 2) + np.int32(first + begin)
                yield encoded.input_ids, offsets, first + end == len(document.text)
                begin = end
            first += len(part) + len(BETWEEN_PARTS)

    def batch(self, pieces: Sequence[Piece], device: str | Device) -> BatchEncoding:
        """Returns ``input_ids``, ``attention_mask`` and ``global_attention_mask``, padded to the right."""
        rows = []
        for piece in pieces:
            separator = self.tokenizer.doc_sep_token_id
            global_attention_mask = [
                int(index < piece.num_globals or token == separator)
                for index, token in enumerate(piece.input_ids)
            ]
            rows.append({"input_ids": piece.input_ids, "global_attention_mask": global_attention_mask})
        return self.tokenizer.pad(rows, return_tensors="pt").to(device)

    def _encode(self, text: str) -> BatchEncoding:
        # In a document `</s>` is text, not its end.
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )


def _end_of_window(text: str, begin: int) -> int:
    """Returns where a window from ``begin`` ends: before a space after a word, which no token reaches across."""
    end = begin + _WINDOW
    if end >= len(text):
        return len(text)
    for at in range(end, begin + _WINDOW // 2, -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return end


def split(text: str, offsets: Sequence[tuple[int, int]] | np.ndarray, room: int) -> list[tuple[int, int]]:
    """Returns token ranges of at most ``room``, one after another over all tokens.

    A range ends in its last quarter, after a paragraph if one ends there, else after a sentence, a line or a word,
    the last of its kind, and else when it is full. ``offsets`` are the tokens' characters in ``text``.
    """
    starts = np.asarray(offsets).reshape(-1, 2)[:, 0]
    spans = []
    begin = 0
    while begin < len(offsets):
        full = begin + room
        stop = len(offsets) if full >= len(offsets) else _boundary(text, starts, full - room // 4, full)
        spans.append((begin, stop))
        begin = stop
    return spans


def _boundary(text: str, starts: np.ndarray, earliest: int, full: int) -> int:
    """Returns the token before which to cut, after ``earliest`` and at the latest ``full``."""
    low, high = int(starts[earliest]), int(starts[full])
    for pattern in _BOUNDARIES:
        for match in reversed(list(pattern.finditer(text, low, high))):
            token = bisect_left(starts, match.end(), earliest, full)
            if earliest < token <= full:
                return token
    return full
