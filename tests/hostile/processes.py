"""Runs one case after another, each in a process of its own under limits on time and memory.

The processes are forks of this one, so that what a case needs is imported once. Nothing may have started threads
before: forks have one thread only.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SECONDS, MEBIBYTES = (
    5,
    1024,
)  # of the processor, so that a busy machine changes nothing; of memory beyond ours
_PATIENCE = 60  # seconds until a process that waits for something is ended


# A name, and what runs the case and says how it ended and, unless it is ``None``, what is wrong with that.
Trial = tuple[str, Callable[[], tuple[str, str | None]]]


@dataclass(frozen=True)
class Ended:
    """Says how a case came to its end. ``status`` is what Python exits with, or minus a signal; ``mebibytes`` of memory
    come on top of what was in use before."""

    status: int
    out: str
    err: str
    seconds: float
    mebibytes: int

    @property
    def fault(self) -> str | None:
        """Returns what no case may do; ``None``: nothing of that."""
        if "Traceback (most recent call last)" in self.err or "Exception ignored" in self.err:
            return f"a traceback: {self.err[-1500:]}"
        if self.seconds > SECONDS or self.mebibytes > MEBIBYTES:
            return f"took {self.seconds:.1f} s and {self.mebibytes} MiB"
        if self.status < 0:
            return f"ended by signal {-self.status}: {self.err[-1500:]}"
        return None

    @property
    def fault_of_command(self) -> str | None:
        """Besides, a command says one sentence when it fails, and says it as itself."""
        if self.fault is not None or self.status == 0:
            return self.fault
        *_, last = self.err.strip().splitlines() or [""]
        if not last.startswith("led") or len(self.err) > 20_000 or self.status not in (1, 2, 3):
            return f"status {self.status} without a sentence: {self.err[-1500:]!r}"
        return None


class Process:
    """Runs ``case``, whose result or ``SystemExit`` is the status."""

    def __init__(self, case: Callable[[], int | None], stdin: Path | None = None) -> None:
        self._before = _pages_in_use(os.getpid())
        self._began = time.monotonic()
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_child(case, stdin, self._out, self._err)

    def end(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end, which is a violent one beyond the limits."""
        while True:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            if done:
                break
            too_large = _mebibytes(_pages_in_use(self.pid) - self._before) > MEBIBYTES
            too_slow = (
                time.monotonic() - self._began > _PATIENCE or _processor_seconds(self.pid) > 2 * SECONDS
            )
            if too_large or too_slow:
                self.end(signal.SIGKILL)
            time.sleep(0.005)
        with self._out, self._err:
            return Ended(
                os.waitstatus_to_exitcode(status),
                _text(self._out),
                _text(self._err),
                usage.ru_utime + usage.ru_stime,
                usage.ru_maxrss // 1024 - _mebibytes(self._before),
            )


def in_process(case: Callable[[], int | None], stdin: Path | None = None) -> Ended:
    return Process(case, stdin).wait()


def _run_child(case: Callable[[], int | None], stdin: Path | None, out: IO[bytes], err: IO[bytes]) -> None:
    status = 1
    try:
        os.setsid()  # what the case kills or interrupts is not us
        for stream, number in ((stdin or Path(os.devnull)).open("rb"), 0), (out, 1), (err, 2):
            os.dup2(stream.fileno(), number)
        status = case() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or 120  # as Python itself
        os._exit(status)


def _pages_in_use(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0


def _mebibytes(pages: int) -> int:
    return pages * resource.getpagesize() >> 20


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(2**20).decode("utf-8", "replace")
