"""Keeps the output of a long run, one JSON line a document, from which an interrupted run can be resumed.

A record says what made it: the command, the model with a fingerprint of its files, the settings, and a hash of the
document. An earlier record counts as done when the same would make it again.
"""

from __future__ import annotations

import json
import os
import stat
from collections import defaultdict
from threading import RLock
from types import TracebackType
from typing import Any

from led_model.batch.documents import Document
from led_model.cli.finding import identity
from led_model.cli.locking import lock
from led_model.cli.records import to_record

_BEGINNINGS = [b'{"led": "%b", "id": ' % command for command in (b"summarize", b"answer", b"classify")]
_MAX_LINE = 2**24  # a record is shorter than so many bytes, as it holds no text of its document
_NOT_COMPARED = ("model",)  # a model may be spelled in several ways, and its fingerprint identifies it


class ResultFile:
    """Appends results, each on disk before the next, and finds those of earlier runs.

    Nothing in the file changes before the first result is there: then what a killed run left of a record is cut off,
    or all earlier results if ``overwrite``. A thread may take earlier results while another appends new ones. One
    process at a time can lock the file, and a change that another one makes to it all the same is noticed before the
    next result.

    Args:
        path: made if it is not there.
        made_by: what makes the results, by name; its values are the same after a round trip through JSON.
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
        # This says where the results of a document begin and how long they are, by the document's key.
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._hash_of: dict[tuple[str, str], str] = {}  # it gives documents' keys by their source and id
        # The first result leaves so many bytes of the file; with None it leaves all.
        self._keep: int | None = 0 if overwrite else None
        self._needs_newline = False
        self._lock_of_file = RLock()
        self._is_new = not os.path.exists(path)
        self._real_path = _checked(path, self._is_new)
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OSError(f"--output {path} cannot be written ({error.strerror}); give a file.") from None
        try:
            if identity(self._file.fileno()) in (identity(1), identity(2)):
                raise OSError(
                    f"--output {path} is the file that this command prints into, too; redirect it to another."
                )
            try:
                lock(self._file, path, "file")
            except OSError:
                self._is_new = False  # that process has made it since, so that it must not be removed
                raise
            # The file must have this size until the next write.
            self._size = os.fstat(self._file.fileno()).st_size
            self._read_earlier(counts=not overwrite)
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
        """Returns an earlier record of this document's text, if there is one; each record is given to one document.

        Raises:
            OSError: when another program has changed the file.
        """
        places = self._places.get(document.key)
        if not places:
            return None
        with self._lock_of_file:
            self.check_unchanged()
            begin, size = places.pop(0)
            self._file.seek(begin)
            return json.loads(self._file.read(size))

    def has_changed(self, document: Document) -> bool:
        """Returns whether a record of the document's name is of another text."""
        known = self._hash_of.get((document.source, str(document.id)))
        return known is not None and known != document.key

    def append(self, document: Document, result: dict[str, Any]) -> dict[str, Any]:
        """Appends a record and returns it when it is on disk.

        Raises:
            OSError: when it is not: the disk is full, or the file was deleted, replaced or changed.
        """
        record = to_record(document, result, self.made_by)
        with self._lock_of_file:
            self.check_unchanged()
            self._append(to_line(record).encode() + b"\n")
        self.count += 1
        return record

    def check_unchanged(self) -> None:
        """Checks that the path still leads to the file that results are appended to, and that no one else changed it.

        Raises:
            OSError: when it does not, or when the file has another size than what was appended gives.
        """
        if identity(self._file.fileno()) != identity(self.path):
            raise OSError(
                f"--output {self.path} was deleted, moved or replaced during the run, and is without its results; "
                "give the same command again."
            )
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError(
                f"--output {self.path} was changed by another program during the run; see what it holds, and give "
                "the same command again."
            )

    def _append(self, line: bytes) -> None:
        """Appends a line to what shall be kept of the file, and returns when it is on disk."""
        try:
            if self._keep is not None:
                self._file.truncate(self._keep)
                self._size, self._keep = self._keep, None
            if self._needs_newline:
                line = b"\n" + line
                self._needs_newline = False
            while line:
                written = self._file.write(line)
                self._size += written
                line = line[written:]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"--output {self.path} cannot be written ({error.strerror}); what is finished is on disk, make room "
                "and give the same command again."
            ) from None

    def _close(self) -> None:
        """Closes the file, and removes it if this run made it and wrote nothing."""
        try:
            if self._is_new and self.count == 0 and os.fstat(self._file.fileno()).st_size == 0:
                self.check_unchanged()
                os.unlink(self._real_path)
        except OSError:
            pass
        self._file.close()

    def _read_earlier(self, counts: bool) -> None:
        """Reads earlier results, and checks that every line is one.

        That is checked with ``overwrite`` too, which permits to lose results but nothing else.

        Args:
            counts: whether these results count.
        """
        whole = 0  # bytes of complete lines
        with open(self.path, "rb") as file:  # buffered, unlike the file that is appended to
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
                is_complete = line.endswith(b"\n")
                record = _parse(line)
                if record is None:
                    if not is_complete and _is_torn(line):
                        self._keep = whole if counts else 0
                        return
                    raise ValueError(
                        f"--output {self.path} line {number} is no result of this program; give another file."
                    )
                if counts:
                    self._count(record, number, (whole, len(line)))
                    self._needs_newline = not is_complete
                whole += len(line)

    def _count(self, record: dict[str, Any], number: int, place: tuple[int, int]) -> None:
        """Notes an earlier record; ``place`` is where its line begins and how long that is, in bytes.

        Raises:
            ValueError: when another model or other settings made it.
        """
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


def to_line(record: dict[str, Any], is_ascii: bool = False) -> str:
    """Returns a record as a line of JSON."""
    return json.dumps(record, ensure_ascii=is_ascii)


def _checked(path: str, is_new: bool) -> str:
    """Returns the path without links.

    Raises:
        OSError: when no results can be appended there.
    """
    if path == "-" or (not is_new and not stat.S_ISREG(os.stat(path).st_mode)):
        raise OSError(
            f"--output {path} is no regular file; give one, or leave --output out for the terminal."
        )
    if not path:
        raise FileNotFoundError("--output has an empty name; give a file.")
    real = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(real)):
        raise FileNotFoundError(f"the directory of --output {path} is not there; make it first.")
    return real


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns a line as a record, or ``None`` if it is something else."""
    if not line.startswith(tuple(_BEGINNINGS)):
        return None
    try:
        record = json.loads(line)
        is_ours = (
            isinstance(record["made_by"], dict)
            and isinstance(record["document"], str)
            and isinstance(record["source"], str)
            and isinstance(record["id"], (str, int))
            and _has_result(record)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_ours else None


def _has_result(record: dict[str, Any]) -> bool:
    """Returns whether a record has a result that can be printed."""
    if "label" not in record:
        return isinstance(record.get("summary", record.get("answer")), str)
    numbers = record.get("probabilities", record["label"])
    return isinstance(numbers, dict) and all(isinstance(number, (int, float)) for number in numbers.values())


def _is_torn(line: bytes) -> bool:
    """Returns whether a line is the beginning of a record and no complete JSON value."""
    if not any(line.startswith(known) or known.startswith(line) for known in _BEGINNINGS):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False
