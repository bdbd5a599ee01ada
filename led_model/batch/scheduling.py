"""Runs a task over many documents: read ahead in a thread, sorted by length, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from led_model.batch.ahead import ReadAhead
from led_model.batch.documents import Document, Unreadable
from led_model.batch.out_of_memory import is_out_of_memory, shortage
from led_model.batch.pieces import Piece
from led_model.batch.tasks import Result, Task
from led_model.overflow import NotFinite
from led_model.terminal import log

Found = TypeVar("Found")

ROWS = 32
"""So many pieces make a batch at most, unless another number is asked for."""

_BATCHES_AHEAD = 64
_CHARACTERS_AHEAD = 2**24  # texts stay in memory until their documents are done
_DOCUMENTS_AHEAD = 4096  # counting those that need no model
_PATIENCE = 1.0  # seconds without another document, and those that are there are not kept waiting


class Outcome(NamedTuple):
    """Holds what became of a document: its result, or the error that left it without one.

    ``about`` says how it was read: its ``tokens`` and ``pieces``, and whether it was ``truncated``.
    """

    document: Document | Unreadable
    result: Result | Exception
    about: dict[str, Any]

    @property
    def problem(self) -> str:
        """Returns a sentence on why there is no result; the error of what cannot be read names that itself."""
        error = self.result
        if isinstance(self.document, Document) and isinstance(error, Exception):
            if isinstance(error, NotFinite):
                return f"{self.document.name}: {error}"
            if is_out_of_memory(error):
                return f"{self.document.name}: {shortage(error)}"
        return str(error)


def run_documents(
    task: Task,
    documents: Iterable[Document | Outcome],
    *,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    read_ahead: int = _BATCHES_AHEAD,
    in_order: bool = False,
) -> Generator[Outcome, None, None]:
    """Yields what becomes of each document as soon as all its pieces are read; no document spoils another.

    A thread iterates over ``documents`` and makes their pieces. Pieces of ``read_ahead`` batches are sorted by length
    and cut into batches of little padding (:func:`cut_batches`), which are run by the order of their first documents.
    A batch that runs out of memory is halved, and so are later ones that are as large. What fails alone is yielded
    with its error: a document that is too long, whose numbers overflow (:class:`NotFinite`) or for which memory does
    not suffice.

    Memory is bounded: beside the documents that are being run, as many are held as are read ahead. Closing the
    iterator ends the thread. Where no document comes for a second, as from a pipe, those that are there are run.

    With a ``batch_size`` of 1, and where a task's ``streamer`` shows what is written, nothing is sorted.

    Args:
        documents: iterated in a thread. An :class:`Outcome` is handed on as it is: it is of a document that
            cannot be read, or needs no model.
        batch_tokens: of a batch, padding included; a piece that has more is read alone. Default: the longest input
            of the model, or ``batch_size`` of these if that is given.
        batch_size: pieces of a batch at most; default: 32.
        read_ahead: batches.
        in_order: whether documents are yielded in the order in which they came, instead of that in which they are
            done.

    Raises:
        BaseException: what iterating over ``documents`` raises.
    """
    tokens = batch_tokens or task.reader.limit * (batch_size or 1)
    rows = batch_size or ROWS
    sorts = rows > 1 and task.streamer is None

    def prepare(item: Document | Outcome) -> _Prepared:
        if isinstance(item, Outcome):
            return _Prepared(item, [])
        try:
            return _Prepared(None, task.reader.pieces(item))
        except (ValueError, MemoryError) as error:
            return _Prepared(Outcome(item, error.with_traceback(None), {}), [])

    def share(prepared: _Prepared) -> float:
        length, count = sum(piece.length for piece in prepared.pieces), len(prepared.pieces)
        return max(
            length / (tokens * read_ahead),
            count / (rows * read_ahead),
            prepared.characters / _CHARACTERS_AHEAD,
            1 / _DOCUMENTS_AHEAD,
        )

    batches = _Batches(task, tokens, rows, sorts)
    with ReadAhead(documents, prepare, share) as ahead:
        while (prepared := ahead.take()) is not None:
            window, held = [prepared], share(prepared)
            while sorts and held < 1 and (prepared := ahead.take(_PATIENCE)) is not None:
                window.append(prepared)
                held += share(prepared)
            outcomes = batches.run(window)
            for _, outcome in in_turn(outcomes) if in_order else outcomes:
                yield outcome


def cut_batches(
    lengths: Sequence[int], batch_tokens: int, batch_size: int, batch_cost: int
) -> list[list[int]]:
    """Returns the indices of the pieces of each batch; pieces are in order, and batches in that of their first.

    Batches hold pieces of similar length, and are such that all of them together cost least: a batch costs its tokens,
    padding included, and ``batch_cost``.

    Args:
        lengths: tokens of each piece.
        batch_tokens: of a batch, padding included; a longer piece is alone.
        batch_size: pieces of a batch at most.
        batch_cost: tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    descending = np.array([lengths[index] for index in order], np.int64)
    # Of the first n pieces: what they cost at least, and where their last batch then begins.
    costs, begins = np.zeros(len(order) + 1), [0]
    for end in range(1, len(order) + 1):
        begin = np.arange(max(0, end - batch_size), end)
        rows = end - begin
        tokens = rows * descending[begin]
        cost = costs[begin] + tokens + batch_cost
        cost[(tokens > batch_tokens) & (rows > 1)] = np.inf
        best = int(cost.argmin())
        costs[end] = cost[best]
        begins.append(int(begin[best]))
    batches, end = [], len(order)
    while end:
        batches.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return sorted(batches)


def _cut_in_turn(lengths: Sequence[int], batch_tokens: int, batch_size: int) -> list[list[int]]:
    """Returns the indices of the pieces of each batch, which are cut one after another, in the order that they have."""
    batches: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        rows = len(batches[-1]) + 1 if batches else 1
        if not batches or rows > batch_size or rows * longest > batch_tokens:
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches


@dataclass
class _Prepared:
    """Holds the pieces of a document, or its outcome if it needs no model."""

    outcome: Outcome | None
    pieces: list[Piece]

    @property
    def characters(self) -> int:
        """Returns how long the text is that is held."""
        document = self.pieces[0].document if self.pieces else self.outcome.document if self.outcome else None
        return len(document.text) if isinstance(document, Document) else 0


class _Batches:
    """Cuts windows of documents into batches and runs them."""

    def __init__(self, task: Task, batch_tokens: int, batch_size: int, sorts: bool) -> None:
        self.task = task
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.sorts = sorts
        # These are the rows and their length of batches that may fit, as those of twice the rows did not.
        self._may_fit: list[tuple[int, int]] = []

    def run(self, window: Sequence[_Prepared]) -> Iterator[tuple[int, Outcome]]:
        """Yields the outcomes of documents with their places in the window, as they are done."""
        pieces: list[Piece] = []
        places: list[int] = []  # of each piece's document
        for place, prepared in enumerate(window):
            if prepared.outcome is not None:
                yield place, prepared.outcome
            pieces += prepared.pieces
            places += [place] * len(prepared.pieces)
        found: dict[int, dict[int, Result]] = {}  # the results of each document's pieces, until it is done
        done: set[int] = set()

        def is_wanted(index: int) -> bool:
            return places[index] not in done

        lengths = [piece.length for piece in pieces]
        limits = (lengths, self.batch_tokens, self.batch_size)
        for batch in cut_batches(*limits, self.task.batch_cost) if self.sorts else _cut_in_turn(*limits):
            for index, result in self._results(batch, pieces, is_wanted):
                place, piece = places[index], pieces[index]
                if not isinstance(result, Exception):
                    of_document = found.setdefault(place, {})
                    of_document[piece.index] = result
                    if len(of_document) < piece.count:
                        continue
                    in_turn = [of_document[i] for i in range(piece.count)]
                    result = self._guarded(partial(self.task.join, piece.document, in_turn))
                found.pop(place, None)
                done.add(place)
                about = {"tokens": piece.tokens, "pieces": piece.count, "truncated": piece.is_truncated}
                yield place, Outcome(piece.document, result, about)

    def _results(
        self, batch: Sequence[int], pieces: Sequence[Piece], is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """Yields the result of each of the ``pieces`` that ``batch`` names, or its error.

        Those that are not wanted, as another piece of their document has failed, are left out.
        """
        batch = [index for index in batch if is_wanted(index)]
        if not batch:
            return
        rows, longest = len(batch), max(pieces[index].length for index in batch)
        if rows == 1 or not self._is_too_large(rows, longest):
            found = self._guarded(partial(self.task.run, [pieces[index] for index in batch]))
            if not isinstance(found, Exception):
                yield from zip(batch, found, strict=True)
                return
            if rows == 1:
                yield batch[0], found
                return
            if is_out_of_memory(found):
                self._may_fit.append(((rows + 1) // 2, longest))
                log(
                    f"memory ran out for a batch of {rows} texts of up to {longest:,} tokens; going on with half as "
                    "many at once."
                )
        if self.sorts:
            batch.sort(key=lambda index: pieces[index].length)
        yield from self._results(batch[: rows // 2], pieces, is_wanted)
        yield from self._results(batch[rows // 2 :], pieces, is_wanted)

    def _guarded(self, call: Callable[[], Found]) -> Found | Exception:
        """Returns what ``call`` does, or the error of a batch or a document that cannot be read as it is."""
        try:
            return call()
        except NotFinite as error:
            failure: Exception = error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        # All that the batch had allocated hangs on the traceback.
        failure.__context__ = failure.__cause__ = None
        failure = failure.with_traceback(None)
        if self.task.device.type == "cuda" and is_out_of_memory(failure):
            torch.cuda.empty_cache()
        return failure

    def _is_too_large(self, rows: int, longest: int) -> bool:
        """Returns whether a batch is larger than the half of one that did not fit, in rows and in tokens."""
        return any(rows > may_fit and rows * longest > may_fit * length for may_fit, length in self._may_fit)


def in_turn(numbered: Iterable[tuple[int, Outcome]]) -> Iterator[tuple[int, Outcome]]:
    """Yields what is numbered from 0 on by its numbers, each as soon as all before it have come."""
    waiting: dict[int, Outcome] = {}
    following = 0
    for number, outcome in numbered:
        waiting[number] = outcome
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1
