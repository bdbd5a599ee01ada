"""The output of a long run, one JSON line a document, that an interrupted run can be resumed from.

A record says what made it: the command, the model with a fingerprint of its files, the settings, and a hash of the
document. An earlier record counts as done when the same would make it again.
"""

from __future__ import annotations

import json
import os
import stat
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

from led_model.documents import Document

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are the user's to avoid
    fcntl = None

_BEGINNING = b'{"led": "'  # of each record
_NOT_COMPARED = ("model",)  # how a model is spelled, as its fingerprint says what it is


class ResultFile:
    """Appends results, each on disk before the next, and knows those of earlier runs.

    Nothing in the file changes before the first result is there: then what a killed run left of a record is cut off,
    or all earlier results if ``overwrite``. Only one process at a time has the file.

    Args:
        path: made if it is not there.
        made_by: what makes the results, by name; its values survive JSON.
        question: for ``answer``; another question's results in the file do not count.
        overwrite: earlier results do not count, and go.

    Raises:
        FileNotFoundError: when the directory is not there.
        OSError: when the path is no regular file, cannot be written, or is another process's output.
        ValueError: when the file holds anything but results, or results of another model or other settings.
    """

    def __init__(
        self, path: str, made_by: dict[str, Any], question: str | None = None, overwrite: bool = False
    ) -> None:
        self.path = path
        self.made_by = made_by
        self.question = question
        self.count = 0  # results in the file that count
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)  # by the key of their document
        self._hash_of: dict[tuple[str, str], str] = {}  # by source and id
        self._keep: int | None = 0 if overwrite else None  # bytes; None: all
        self._needs_newline = False
        self._is_new = not os.path.exists(path)
        if not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(f"the directory of --output {path} is not there; make it first.")
        if path == "-" or (not self._is_new and not stat.S_ISREG(os.stat(path).st_mode)):
            raise OSError(
                f"--output {path} is no regular file; give one, or leave --output out for the terminal."
            )
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OSError(f"--output {path} cannot be written ({error.strerror}); give a file.") from None
        try:
            self._lock()
            if not overwrite:
                self._read_earlier()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def take(self, document: Document) -> dict[str, Any] | None:
        """An earlier record of this document's text, if there is one; each record is taken by one document."""
        places = self._places.get(document.key)
        if not places:
            return None
        begin, size = places.pop(0)
        self._file.seek(begin)
        return json.loads(self._file.read(size))

    def has_changed(self, document: Document) -> bool:
        """Whether a record of the document's name is of another text."""
        known = self._hash_of.get((document.source, str(document.id)))
        return known is not None and known != document.key

    def append(self, document: Document, result: dict[str, Any]) -> dict[str, Any]:
        """Returns the record, when it is on disk.

        Raises:
            OSError: when it is not: the disk is full, or the file was deleted or replaced.
        """
        self.check_that_it_is_there()
        record = {"led": self.made_by["command"], "id": document.id, "source": document.source} | result
        record |= {"document": document.key, "made_by": self.made_by}
        line = to_line(record).encode() + b"\n"
        try:
            if self._keep is not None:
                self._file.truncate(self._keep)
                self._keep = None
            if self._needs_newline:
                line = b"\n" + line
                self._needs_newline = False
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"--output {self.path} cannot be written ({error.strerror}); what is finished is on disk, make room "
                "and give the same command again."
            ) from None
        self.count += 1
        return record

    def check_that_it_is_there(self) -> None:
        """Raises OSError when the path does not lead to the file any more that results are appended to."""
        own = os.fstat(self._file.fileno())
        try:
            present = os.stat(self.path)
        except OSError:
            present = None
        if present is None or (own.st_dev, own.st_ino) != (present.st_dev, present.st_ino):
            raise OSError(
                f"--output {self.path} was deleted or replaced during the run, and its results are gone; give the "
                "same command again."
            )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._is_new = False  # that process has made it since, and it is not ours to take away
            raise OSError(
                f"--output {self.path} is being written by another process; wait for it, or give another file."
            ) from None

    def _close(self) -> None:
        """A file that was made and got nothing goes again."""
        try:
            if self._is_new and self.count == 0 and os.fstat(self._file.fileno()).st_size == 0:
                self.check_that_it_is_there()
                os.unlink(self.path)
        except OSError:
            pass
        self._file.close()

    def _read_earlier(self) -> None:
        whole = 0  # bytes of complete lines
        with open(self.path, "rb") as file:  # with a buffer, unlike the one that is appended to
            for number, line in enumerate(file, 1):
                is_complete = line.endswith(b"\n")
                record = _parse(line)
                if record is None:
                    if not is_complete and _begins_as_ours(line):
                        self._keep = whole
                        return
                    raise ValueError(
                        f"--output {self.path} line {number} is no result of this program; give another file."
                    )
                self._count(record, number, (whole, len(line)))
                whole += len(line)
                self._needs_newline = not is_complete

    def _count(self, record: dict[str, Any], number: int, place: tuple[int, int]) -> None:
        """``place``: where its line begins, and how long that is, in bytes."""
        made_by = record["made_by"]
        different = [
            name
            for name in {**made_by, **self.made_by}
            if name not in _NOT_COMPARED and made_by.get(name) != self.made_by.get(name)
        ]
        if different:
            name = different[0]
            raise ValueError(
                f"--output {self.path} line {number} was made with {name} {made_by.get(name)!r} and this run has "
                f"{self.made_by.get(name)!r}; give --overwrite to begin it anew, or another file."
            )
        if record.get("question") == self.question:
            self.count += 1
            self._places[record["document"]].append(place)
            self._hash_of[record["source"], str(record["id"])] = record["document"]


def to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record of ours, else None."""
    try:
        record = json.loads(line)
        is_ours = (
            line.startswith(_BEGINNING)
            and isinstance(record["made_by"], dict)
            and isinstance(record["document"], str)
            and isinstance(record["source"], str)
            and "id" in record
            and not {"summary", "answer", "label"}.isdisjoint(record)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_ours else None


def _begins_as_ours(line: bytes) -> bool:
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
