"""Finds the documents that a command was given, and reads them one at a time."""

from __future__ import annotations

import codecs
import glob
import hashlib
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
MOST_BYTES = 2**28  # of a document, or of a file that can be read but once; far beyond what a model reads

# What is no text by its first bytes, and what makes text of it.
_OTHER_FORMATS = {
    b"%PDF": "is a PDF; run pdftotext on it",
    b"PK\x03\x04": "is an archive or an office document; unpack it, or save it as text",
    b"\x1f\x8b": "is compressed by gzip; run gunzip on it",
    b"\xd0\xcf\x11\xe0": "is an old office document; save it as text",
    b"{\\rtf": "is RTF; save it as text",
}


_TOO_MUCH = f"holds more than {MOST_BYTES >> 20} MiB of text; split it."


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
    has_own_id: bool = False

    @classmethod
    def of_parts(
        cls, id: str | int, source: str, parts: Sequence[str], size: int, has_own_id: bool = False
    ) -> Document:
        own = tuple(parts) if len(parts) > 1 else ()
        return cls(id, source, BETWEEN_PARTS.join(parts), size, own, has_own_id)

    @property
    def key(self) -> str:
        """What it is known by in results: its text, in its parts, and the id that it was given, but no name of a file
        or line."""
        identity = json.dumps([self.id if self.has_own_id else None, self.parts or self.text])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

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
                sizes = [len(line) for line in _lines_of(file) if line.strip()]
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
                    yield self._text(file.read(MOST_BYTES + 1))
        except OSError as error:
            yield Unreadable(f"{self.name} cannot be read ({error.strerror}); check its permissions.", 0)

    @property
    def _is_stream(self) -> bool:
        return self.path == "-" or not os.path.isfile(self.path)

    @cached_property
    def _stream(self) -> bytes:
        """What can be read but once: stdin, or a pipe that has a path."""
        if self.path == "-":
            return sys.stdin.buffer.read(MOST_BYTES + 1)
        with open(self.path, "rb") as file:
            return file.read(MOST_BYTES + 1)

    def _open(self) -> BinaryIO:
        return BytesIO(self._stream) if self._is_stream else open(self.path, "rb")

    def _text(self, data: bytes) -> Document | Unreadable:
        if len(data) > MOST_BYTES:
            return Unreadable(f"{self.name} {_TOO_MUCH}", len(data))
        for beginning, sentence in _OTHER_FORMATS.items():
            if data.startswith(beginning):
                return Unreadable(f"{self.name} {sentence}.", len(data))
        try:
            is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
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
        for number, line in enumerate(_lines_of(file), 1):
            if not line.strip():
                continue
            where = f"{self.name} line {number}"
            if len(line) > MOST_BYTES:
                yield Unreadable(f"{where} {_TOO_MUCH}", len(line))
                return
            try:
                document_id, parts, is_own = self._parse(line.removeprefix(b"\xef\xbb\xbf"), number)
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
            yield Document.of_parts(document_id, self.name, parts, len(line), is_own)

    def _parse(self, line: bytes, number: int) -> tuple[str | int, list[str], bool]:
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
        is_own = document_id is not None
        parts = text if isinstance(text, list) else [text]
        if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(
                f"has no text in {self.text_field!r}; give a string that is not blank, or a list of such strings."
            )
        document_id = document_id if is_own else number
        if isinstance(document_id, bool) or not isinstance(document_id, (str, int)):
            raise ValueError(f"has the id {document_id!r}; give a string or an integer, or none.")
        try:
            "".join([str(document_id), *parts]).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair; escape the character in full.") from None
        return document_id, parts, is_own


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of which one that is too long is cut, and the last."""
    while line := file.readline(MOST_BYTES + 1):
        yield line
        if len(line) > MOST_BYTES:
            return


def find_sources(
    inputs: Iterable[str], *, jsonl: bool = False, text_field: str = "text", leave_out: str | None = None
) -> tuple[list[Source], list[str]]:
    """What files, directories (with all below them that is not hidden), globs and ``-`` name, each file once.

    Args:
        jsonl: stdin and files of any name are JSONL; otherwise those that end in .jsonl.
        leave_out: a file, the command's own output, that directories and globs do not name.

    Raises:
        ValueError: when an input is that file.

    Returns:
        The sources in the order given, those of a directory or glob sorted, and one sentence about each input
        that names none.
    """
    sources: dict[str, Source] = {}
    problems = []
    own = leave_out and os.path.realpath(leave_out)
    for item in inputs:
        if own and item != "-" and os.path.realpath(item) == own:
            raise ValueError(
                f"{item} is the --output, too, which would be read and written; give another file."
            )
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
