"""Runs a task over many documents: read ahead in a thread, sorted by length, in batches that fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from led_model.batch.ahead import ReadAhead
from led_model.batch.cutting import cut_batches, cut_in_turn
from led_model.batch.documents import Document, Unreadable
from led_model.batch.out_of_memory import is_out_of_memory, shortage
from led_model.batch.pieces import Piece
from led_model.batch.tasks import Result, Task
from led_model.overflow import NotFinite
from led_model.schema import check_values, integer
from led_model.terminal import log

Found = TypeVar("Found")

ROWS = 32
"""So many pieces make a batch at most, unless another number is asked for.

On a CPU, a model of led-base's shape writes a token of one text in 15.8 ms, and of 4, 8, 16, 32 or 64 texts in 7.5,
5.6, 5.1, 4.4 or 4.2 ms a text. The memory that a batch takes grows with their number.
"""

_BATCHES_AHEAD = 64
_CHARACTERS_AHEAD = 2**24  # texts stay in memory until their documents are done
_DOCUMENTS_AHEAD = 4096  # counting those that need no model
_PATIENCE = 1.0  # seconds that documents are kept waiting in all for others to be read at once with


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
    read_ahead: int | None = None,
    in_order: bool = False,
) -> Generator[Outcome, None, None]:
    """Yields what becomes of each document as soon as all its pieces are read; no document spoils another.

    A thread iterates over ``documents`` and makes their pieces. Pieces of ``read_ahead`` batches are sorted by length
    and cut into batches of little padding, which are run by the order of their first documents. A batch that runs out
    of memory is halved, and so are later ones that are as large. What fails alone is yielded with its error: a
    document that is too long, whose numbers overflow (:class:`NotFinite`) or for which memory does not suffice.

    Memory is bounded: beside the documents that are being run, as many are held as are read ahead. Closing the
    iterator ends the thread. Where documents have waited for others for a second, as in a pipe, they are run.

    With a ``batch_size`` of 1, and where a task's ``streamer`` shows what is written, nothing is sorted.

    Args:
        documents: iterated in a thread. An :class:`Outcome` is handed on as it is: it is of a document that
            cannot be read, or needs no model.
        batch_tokens: of a batch, padding included; a piece that has more is read alone. Default: the longest input
            of the model, or ``batch_size`` of these if that is given.
        batch_size: pieces of a batch at most; default: 32.
        read_ahead: batches; default: 64.
        in_order: whether documents are yielded in the order in which they came, instead of that in which they are
            done.

    Raises:
        ValueError: for limits that are no positive integers.
        BaseException: what iterating over ``documents`` raises.
    """
    limits = {"batch_tokens": batch_tokens, "batch_size": batch_size, "read_ahead": read_ahead}
    check_values(limits, dict.fromkeys(limits, integer(1).optional))
    tokens = batch_tokens or task.reader.limit * (batch_size or 1)
    batches = _Batches(task, tokens, batch_size or ROWS, read_ahead or _BATCHES_AHEAD)
    return _run(documents, batches, in_order)


def _run(
    documents: Iterable[Document | Outcome], batches: _Batches, in_order: bool
) -> Generator[Outcome, None, None]:
    with ReadAhead(documents, batches.prepare, batches.share) as ahead:
        while (prepared := ahead.take()) is not None:
            window, held, patience = [prepared], batches.share(prepared), _PATIENCE
            while batches.sorts and held < 1:
                began = time.monotonic()
                if (prepared := ahead.take(max(patience, 0))) is None:
                    break
                patience -= time.monotonic() - began
                window.append(prepared)
                held += batches.share(prepared)
            outcomes = batches.run(window)
            for _, outcome in in_turn(outcomes) if in_order else outcomes:
                yield outcome


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
    """Makes pieces of documents, cuts windows of these into batches and runs them."""

    def __init__(self, task: Task, batch_tokens: int, batch_size: int, read_ahead: int) -> None:
        self.task = task
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.read_ahead = read_ahead
        self.sorts = batch_size > 1 and task.streamer is None
        # These are the rows and their length of batches that may fit, as those of twice the rows did not.
        self._may_fit: list[tuple[int, int]] = []

    def prepare(self, item: Document | Outcome) -> _Prepared:
        """Returns a document's pieces; it is called in the thread that reads ahead."""
        if isinstance(item, Outcome):
            return _Prepared(item, [])
        try:
            return _Prepared(None, self.task.reader.pieces(item))
        except (ValueError, MemoryError) as error:
            return _Prepared(Outcome(item, error.with_traceback(None), {}), [])

    def share(self, prepared: _Prepared) -> float:
        """Returns what part of a window a document takes."""
        tokens, rows = sum(piece.length for piece in prepared.pieces), len(prepared.pieces)
        return max(
            tokens / (self.batch_tokens * self.read_ahead),
            rows / (self.batch_size * self.read_ahead),
            prepared.characters / _CHARACTERS_AHEAD,
            1 / _DOCUMENTS_AHEAD,
        )

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
        for batch in cut_batches(*limits, self.task.batch_cost) if self.sorts else cut_in_turn(*limits):
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
