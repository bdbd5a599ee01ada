"""Reads pipes that have a name without waiting for ever for a writer."""

from __future__ import annotations

import io
import os
import select
from typing import Any

_WAIT_MILLISECONDS = 3000  # how long a reader waits for a writer


class NoWriter(Exception):
    """Says that nobody writes into a pipe."""


class Pipe(io.FileIO):
    """A pipe with a name, or the shell's ``<(command)``, whose first read waits for a writer for a while.

    Raises:
        NoWriter: by the first read, when no writer comes.
    """

    _is_new = True

    def __init__(self, path: str) -> None:
        # A blocking open would wait for a writer.
        super().__init__(os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def readinto(self, buffer: Any) -> int | None:
        if self._is_new:
            self._is_new = False
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            is_written = bool(poll.poll(_WAIT_MILLISECONDS))
            count = super().readinto(buffer)  # it is None if there is a writer who has not written yet
            if count == 0 and not is_written:
                raise NoWriter
            os.set_blocking(self.fileno(), True)
            if count is not None:
                return count
        return super().readinto(buffer)
