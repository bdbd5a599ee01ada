"""Keeps two runs from one output."""

from __future__ import annotations

import errno
from typing import IO, Any

from led_model.terminal import log

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two runs from one output
    fcntl = None


def lock(file: IO[Any], output: str, kind: str) -> None:
    """Locks the file of an ``output``, which is a ``kind`` of thing, until it is closed.

    Where files cannot be locked, as on some that several machines share, it says so.

    Raises:
        OSError: when another process has locked it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OSError(
                f"--output {output} is being written by another process; wait for it, or give another {kind}."
            ) from None
        log(f"--output {output} cannot be locked ({error.strerror}); let no other run write into it.")
