"""Lets a run end at the next place where nothing is lost, when a signal asks for that."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Notes the first Ctrl-C, or SIGTERM, within a ``with`` block; a second one stops at once.

    Args:
        on_first: is called at the first one.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.on_first = on_first
        self.signal: int | None = None
        self._earlier: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Returns whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.signal = number
        self.on_first()
