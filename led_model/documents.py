"""Finds the documents that a command was given, and reads them one at a time."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

BETWEEN_PARTS = "\n\n"
SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text; ``source`` is its file as the user named it, ``id`` the file too, or what its JSON line says.

    ``size`` is in bytes of the file. ``parts`` are the texts that were joined by blank lines, if several were.
    """

    id: str | int
    source: str
    text: str
    size: int
    parts: tuple[str, ...] = ()

    @classmethod
    def of_parts(cls, id: str | int, source: str, parts: Sequence[str], size: int) -> Document:
        return cls(id, source, BETWEEN_PARTS.join(parts), size, tuple(parts) if len(parts) > 1 else ())

    @property
    def name(self) -> str:
        """For messages."""
        return self.source if self.id == self.source else f"{self.source}, document {self.id}"


@dataclass(frozen=True)
class Unreadable:
    """What is wrong with one document, in one sentence, and its size in bytes."""

    message: str
    size: int


@dataclass
class Source:
    """A file of one text, or of one document a line (JSONL). ``path`` is ``-`` for stdin."""

    path: str
    is_jsonl: bool
    text_field: str = "text"

    @property
    def name(self) -> str:
        """UTF-8, unlike some file names."""
        return "stdin" if self.path == "-" else os.fsencode(self.path).decode("utf-8", "replace")

    @cached_property
    def extent(self) -> tuple[int, int]:
        """How many documents there are, and their bytes."""
        try:
            if not self.is_jsonl:
                return 1, len(self._stream) if self._is_stream else os.path.getsize(self.path)
            with self._open() as file:
                sizes = [len(line) for line in file if line.strip()]
            return len(sizes), sum(sizes)
        except OSError:  # read() says why
            return 1, 0

    def read(self) -> Iterator[Document | Unreadable]:
        """The documents in the file's order. Blank JSON lines are none."""
        try:
            with self._open() as file:
                if self.is_jsonl:
                    yield from self._lines(file)
                else:
                    yield self._text(file.read())
        except OSError as error:
            yield Unreadable(f"{self.name} cannot be read ({error.strerror}); check its permissions.", 0)

    @property
    def _is_stream(self) -> bool:
        return self.path == "-" or not os.path.isfile(self.path)

    @cached_property
    def _stream(self) -> bytes:
        """What can be read but once: stdin, or a pipe that has a path."""
        return sys.stdin.buffer.read() if self.path == "-" else Path(self.path).read_bytes()

    def _open(self) -> BinaryIO:
        return BytesIO(self._stream) if self._is_stream else open(self.path, "rb")

    def _text(self, data: bytes) -> Document | Unreadable:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Unreadable(
                f"{self.name} is not UTF-8 at byte {error.start}; convert it, for instance with iconv.",
                len(data),
            )
        if not text.strip():
            return Unreadable(f"{self.name} holds no text; give one.", len(data))
        return Document(self.name, self.name, text, len(data))

    def _lines(self, file: BinaryIO) -> Iterator[Document | Unreadable]:
        line_of: dict[str, int] = {}  # where each id was
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{self.name} line {number}"
            try:
                document_id, parts = self._parse(line.removeprefix(b"\xef\xbb\xbf"), number)
            except ValueError as error:
                yield Unreadable(f"{where} {error}", len(line))
                continue
            first = line_of.setdefault(str(document_id), number)
            if first != number:
                yield Unreadable(
                    f"{where} has the id of line {first}, {document_id!r}; give each document its own, or none.",
                    len(line),
                )
                continue
            yield Document.of_parts(document_id, self.name, parts, len(line))

    def _parse(self, line: bytes, number: int) -> tuple[str | int, list[str]]:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 at byte {error.start}; convert the file.") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not valid JSON ({error}); repair it.") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"holds a {type(record).__name__}; give a JSON object with a {self.text_field!r}."
            )
        if self.text_field not in record:
            known = ", ".join(map(repr, record)) or "nothing"
            raise ValueError(f"has no {self.text_field!r} but {known}; name the text with --text-field.")
        text, document_id = record[self.text_field], record.get("id")
        parts = text if isinstance(text, list) else [text]
        if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(
                f"has no text in {self.text_field!r}; give a string that is not blank, or a list of such strings."
            )
        document_id = number if document_id is None else document_id
        if isinstance(document_id, bool) or not isinstance(document_id, (str, int)):
            raise ValueError(f"has the id {document_id!r}; give a string or an integer, or none.")
        try:
            "".join([str(document_id), *parts]).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair; escape the character in full.") from None
        return document_id, parts


def find_sources(
    inputs: Iterable[str], *, jsonl: bool = False, text_field: str = "text", leave_out: str | None = None
) -> tuple[list[Source], list[str]]:
    """What files, directories (with all below them that is not hidden), globs and ``-`` name, each file once.

    Args:
        jsonl: stdin and files of any name are JSONL; otherwise those that end in .jsonl.
        leave_out: a file, the command's own output, that directories and globs do not name.

    Returns:
        The sources in the order given, those of a directory or glob sorted, and one sentence about each input
        that names none.
    """
    sources: dict[str, Source] = {}
    problems = []
    own = leave_out and os.path.realpath(leave_out)
    for item in inputs:
        try:
            paths = [path for path in _expand(item) if os.path.realpath(path) != own]
            if not paths:
                raise ValueError(f"{item} names nothing but the --output itself; give another.")
        except ValueError as error:
            problems.append(str(error))
            continue
        for path in paths:
            is_jsonl = jsonl or path.lower().endswith(".jsonl")
            key = path if path == "-" else os.path.realpath(path)
            sources.setdefault(key, Source(path, is_jsonl, text_field))
    return list(sources.values()), problems


def _expand(item: str) -> list[str]:
    if item == "-":
        return [item]
    if os.path.isdir(item):
        return _documents_below(item)
    if os.path.exists(item):
        return [os.path.normpath(item)]
    if not glob.has_magic(item):
        raise ValueError(f"{item} is not there; give a text file, a directory, or - for stdin.")
    found = sorted(path for path in glob.glob(item, recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError(f"{item} matches no file; quote the pattern, and use ** for any depth.")
    return list(map(os.path.normpath, found))


def _documents_below(directory: str) -> list[str]:
    found = sorted(
        os.path.normpath(path)
        for path in Path(directory).rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_hidden(path.relative_to(directory))
    )
    if not found:
        raise ValueError(f"{directory} holds no {', '.join(SUFFIXES)} file; give files, or a glob.")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
