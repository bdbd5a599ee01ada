"""Deals documents out in portions, which get smaller towards the end, so that all processes end at about one time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from led_model.batch.ahead import ReadAhead
from led_model.batch.documents import Document
from led_model.batch.scheduling import ROWS, Outcome

_BATCHES = 16  # of a portion, as far as its characters tell
_CHARACTERS_PER_TOKEN = 4
_CHARACTERS_AHEAD = 2**24
_DOCUMENTS_AHEAD = 4096
_PASSED = 1000  # outcomes of documents that need no process are held back to that number


@dataclass
class End:
    """Stands after the last document; ``error`` is what reading them has raised."""

    error: BaseException | None = None


Item: TypeAlias = Document | Outcome | End


def to_the_end(documents: Iterable[Document | Outcome]) -> Iterator[Item]:
    """Yields documents and outcomes, and at last an :class:`End`."""
    try:
        yield from documents
    except GeneratorExit:  # Nobody wants more.
        raise
    except BaseException as error:
        yield End(error)
    else:
        yield End()


class Portions:
    """Numbers documents as they come, and deals them out to ``processes``.

    A portion is an equal share of what has been read, as far as that is not more than some batches. What is given
    back is dealt out once more, one document at a time.
    """

    def __init__(self, ahead: ReadAhead[Item], processes: int) -> None:
        self._ahead = ahead
        self._processes = processes
        self._max_characters, self._max_documents = 1, 1  # of a portion, once set_size has been called
        self._waiting: deque[tuple[int, Document]] = deque()
        self._characters = 0  # of those that wait
        self._again: deque[tuple[int, Document]] = deque()
        self._tried: set[int] = set()
        self._passed: deque[tuple[int, Outcome]] = deque()
        self._count = 0
        self._error: BaseException | None = None
        self.is_read = False  # whether all documents have been read

    @staticmethod
    def share(item: Item) -> float:
        """Returns what part of the memory for what is read ahead an item takes."""
        document = item.document if isinstance(item, Outcome) else item
        characters = len(document.text) if isinstance(document, Document) else 0
        return max(characters / _CHARACTERS_AHEAD, 1 / _DOCUMENTS_AHEAD)

    def set_size(self, longest: int, batch_tokens: int | None, batch_size: int | None) -> None:
        """Sets how large portions may be; ``longest`` is in tokens what the model reads at once."""
        tokens = batch_tokens or longest * (batch_size or 1)
        self._max_characters = _BATCHES * tokens * _CHARACTERS_PER_TOKEN
        self._max_documents = _BATCHES * (batch_size or ROWS)

    def fill(self) -> bool:
        """Takes what has been read, as far as that is needed, waits for nothing, and tells whether more may be there.

        That is so where outcomes that need no process have to be taken away first.
        """
        while (
            not self.is_read
            and len(self._passed) < _PASSED
            and len(self._waiting) < self._processes * self._max_documents
            and self._characters < self._processes * self._max_characters
            and (item := self._ahead.take(0)) is not None
        ):
            if isinstance(item, End):
                self.is_read, self._error = True, item.error
            elif isinstance(item, Outcome):
                self._passed.append((self._count, item))
                self._count += 1
            else:
                self._waiting.append((self._count, item))
                self._count += 1
                self._characters += len(item.text)
        return not self.is_read and len(self._passed) >= _PASSED

    @property
    def is_finished(self) -> bool:
        """Returns whether nothing is left to deal out."""
        return self.is_read and not self._waiting and not self._again and not self._passed

    def check(self) -> None:
        """Raises what reading the documents has raised, which is for when all that came before are done."""
        if self._error is not None:
            raise self._error

    def passed(self) -> Iterator[tuple[int, Outcome]]:
        """Yields outcomes that need no process, with their numbers."""
        while self._passed:
            yield self._passed.popleft()

    def take(self, before: int | None = None) -> dict[int, Document] | None:
        """Returns a portion, documents by their numbers, or ``None`` if there is nothing.

        With ``before`` there is nothing where the next document has that number or a later one.
        """
        if self._again:
            return dict([self._again.popleft()])
        if not self._waiting or (before is not None and self._waiting[0][0] >= before):
            return None
        characters = min(self._max_characters, self._characters // self._processes)
        documents = min(self._max_documents, -(-len(self._waiting) // self._processes))
        portion: dict[int, Document] = {}
        taken = 0
        while self._waiting and len(portion) < documents:
            length = len(self._waiting[0][1].text)
            if portion and taken + length > characters:
                break
            number, document = self._waiting.popleft()
            portion[number] = document
            taken += length
        self._characters -= taken
        return portion

    def give_back(self, unfinished: Mapping[int, Document]) -> list[tuple[int, Document]]:
        """Takes back what a process did not finish, and returns what had been given back before."""
        given_up = [item for item in unfinished.items() if item[0] in self._tried]
        again = [item for item in unfinished.items() if item[0] not in self._tried]
        self._tried.update(number for number, _ in again)
        self._again += again
        return given_up
