"""The output of a long run, one JSON line a document, that an interrupted run can be resumed from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from led_model.documents import Document


class ResultFile:
    """Appends results, each on disk before the next, and knows those of earlier runs.

    Of a line that was cut when a run was killed nothing is kept: its document is not done.

    Args:
        path: made if it is not there.
        field: what every result of this command has, ``summary`` for instance.
        question: for ``answer``; another question's results in the file do not count.

    Raises:
        FileNotFoundError: when the directory is not there.
        ValueError: when the file holds anything but such results.
    """

    def __init__(self, path: str, field: str, question: str | None = None) -> None:
        self.path = path
        self.field = field
        self.question = question
        self.done: set[tuple[str, str]] = set()
        if not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(f"the directory of --output {path} is not there; make it first.")
        try:
            self._file = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise OSError(f"--output {path} cannot be written ({error.strerror}); give a file.") from None
        try:
            self._read_earlier()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, document: Document) -> bool:
        return (document.source, str(document.id)) in self.done

    def append(self, record: dict[str, Any]) -> None:
        """Returns when ``record`` is on disk."""
        self._file.write(to_line(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add((record["source"], str(record["id"])))

    def _read_earlier(self) -> None:
        self._file.seek(0)
        whole = 0  # bytes of complete lines
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
                key = record["source"], str(record["id"])
                is_ours = self.field in record
            except (ValueError, TypeError, KeyError):
                is_ours = False
            if not is_ours:
                raise ValueError(
                    f"--output {self.path} line {number} is no result of this command, with a {self.field!r}; "
                    "give another file."
                )
            if record.get("question") == self.question:
                self.done.add(key)
        self._file.truncate(whole)


def to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
