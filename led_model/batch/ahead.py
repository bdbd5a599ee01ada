"""Reads ahead in a thread, no further than a bound."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from threading import Condition, Thread
from types import TracebackType
from typing import Generic, TypeVar

Raw = TypeVar("Raw")
Item = TypeVar("Item")

_LAST_WAIT = 0.5  # seconds: whoever waits for a pipe at the end is not waited for any longer


class ReadAhead(Generic[Item]):
    """Iterates over ``source`` and prepares what it yields in a thread, which begins and ends with the ``with`` block.

    Args:
        source: iterated in the thread, where it may wait for a file or a pipe.
        prepare: takes what ``source`` yields to what :meth:`take` returns, in a bounded time, also in the thread.
        share: tells what part of the memory for all prepared items one takes. The thread pauses where those that
            nobody has taken yet have reached 1, so that one more than fits is prepared at most.
    """

    def __init__(
        self, source: Iterable[Raw], prepare: Callable[[Raw], Item], share: Callable[[Item], float]
    ) -> None:
        self._share = share
        self._changed = Condition()  # guards all of the following
        self._ready: deque[tuple[Item, float]] = deque()
        self._held = 0.0
        self._error: BaseException | None = None
        self._is_finished = self._is_stopped = self._is_preparing = False
        # Whether messages are wanted is a context's, and a thread begins with an empty one.
        self._thread = Thread(
            target=copy_context().run, args=(self._read, source, prepare), name="read-ahead", daemon=True
        )

    def __enter__(self) -> ReadAhead[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, and leaves it behind only if it waits for a pipe in which nothing comes."""
        with self._changed:
            self._is_stopped = True
            self._ready.clear()
            self._changed.notify_all()
        last = time.monotonic() + _LAST_WAIT
        while self._thread.is_alive() and (self._is_preparing or time.monotonic() < last):
            self._thread.join(0.02)

    def take(self, patience: float | None = None) -> Item | None:
        """Returns the next item, or ``None`` if there is no other, or none has come for ``patience`` seconds.

        Raises:
            BaseException: what ``source`` or ``prepare`` has raised, once all items before it have been taken; with
                ``patience`` it is left to the next call without.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_finished, patience)
            if self._ready:
                item, share = self._ready.popleft()
                self._held -= share
                self._changed.notify_all()
                return item
            if self._error is not None and patience is None:
                raise self._error
            return None

    def _read(self, source: Iterable[Raw], prepare: Callable[[Raw], Item]) -> None:
        """Iterates until there is nothing more to read, or nobody wants it."""
        try:
            for raw in source:
                self._is_preparing = True
                item = prepare(raw)
                del raw
                if not self._put(item):
                    return
                del item
                self._is_preparing = False
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._is_finished, self._is_preparing = True, False
                self._changed.notify_all()

    def _put(self, item: Item) -> bool:
        """Waits for room, adds the item, and returns whether anybody may still want it."""
        share = self._share(item)
        with self._changed:
            self._changed.wait_for(lambda: self._held < 1 or not self._ready or self._is_stopped)
            if self._is_stopped:
                return False
            self._held += share
            self._ready.append((item, share))
            self._changed.notify_all()
            return True
