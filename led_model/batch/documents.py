"""Reads documents one at a time, from files, pipes or stdin, and no more than a bound of each."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

from led_model.batch.json_lines import check_encodable, parse_record, parts_of, short
from led_model.batch.pipe import NoWriter, Pipe

BETWEEN_PARTS = "\n\n"
# A document has no more: that is a hundred books, of which Python and the tokenizer hold copies.
MAX_BYTES = 2**25
# After as many bytes of a line that is too long, the next line is not looked for.
_MAX_SKIPPED = 4 * MAX_BYTES
# After so many lines without a document, one after another, a file is taken for one of something else.
_MAX_FAULTS_FIRST, _MAX_FAULTS, _MAX_BLANKS = 20, 100, 10_000

# These are the first bytes of files that are no text, with what such a file is and what makes text of it.
_OTHER_FORMATS = {
    b"%PDF": "is a PDF; run pdftotext on it",
    b"PK\x03\x04": "is an archive or an office document; unpack it, or save it as text",
    b"\x1f\x8b": "is compressed by gzip; run gunzip on it",
    b"\xd0\xcf\x11\xe0": "is an old office document; save it as text",
    b"{\\rtf": "is RTF; save it as text",
}

_REMEDIES: dict[type[OSError], str] = {
    PermissionError: "check its permissions",
    FileNotFoundError: "it is there no more",
}

# These are encodings by their byte order mark. UTF-32 comes first, as its mark begins like that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Document:
    """Holds one text; ``source`` is its file as the user named it, ``id`` the file too, or what its JSON line says.

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
        """Returns the document whose text is ``parts``, joined by blank lines."""
        own = tuple(parts) if len(parts) > 1 else ()
        return cls(id, source, BETWEEN_PARTS.join(parts), size, own, has_own_id)

    @property
    def key(self) -> str:
        """Returns a hash by which results know the document: of its text, its parts and an id of its own.

        The names of its file and line are no part of it.
        """
        identity = json.dumps([self.id if self.has_own_id else None, self.parts or self.text])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Returns what messages call the document."""
        return self.source if self.id == self.source else f"{self.source}, document {self.id}"


@dataclass(frozen=True)
class Unreadable:
    """Says what is wrong with one document, in one sentence, and its size in bytes."""

    message: str
    size: int


@dataclass
class Source:
    """Reads a file of one text, or of one document a line (JSONL). ``path`` is ``-`` for stdin.

    Of the lines that are not blank it reads each ``every``-th, beginning with number ``first`` from 0; others are not
    parsed.
    """

    path: str
    is_jsonl: bool
    text_field: str = "text"
    every: int = 1
    first: int = 0

    @property
    def name(self) -> str:
        """Returns what messages and results call the file, in UTF-8, which not all file names are."""
        return "stdin" if self.path == "-" else os.fsencode(self.path).decode("utf-8", "replace")

    @property
    def size(self) -> int:
        """Returns the bytes of the documents, as far as the file tells without being read, else 0."""
        try:
            return os.path.getsize(self.path) // self.every if self.is_file else 0
        except OSError:  # read() says why
            return 0

    @property
    def is_file(self) -> bool:
        """Returns whether the path is that of a regular file, which can be read more than once."""
        return self.path != "-" and os.path.isfile(self.path)

    def read(self) -> Iterator[Document | Unreadable]:
        """Yields what :meth:`documents` does, and a sentence on a file that cannot be read, or not to its end."""
        try:
            yield from self.documents()
        except OSError as error:
            yield Unreadable(self.why(error), 0)
        except NoWriter:
            yield Unreadable(f"{self.name} is a pipe that nobody writes into; start its writer first.", 0)

    def documents(self) -> Iterator[Document | Unreadable]:
        """Yields the documents in the file's order, without blank lines of JSONL.

        Raises:
            OSError: when the file cannot be read, or not to its end.
            NoWriter: when it is a pipe that nobody writes into.
        """
        with self._open() as file:
            if self.is_jsonl:
                yield from self._lines(file)
            else:
                yield self._text(file.read(MAX_BYTES + 1))

    def why(self, error: OSError) -> str:
        """Returns a sentence on why the file cannot be read."""
        remedy = _REMEDIES.get(type(error), "give a text file")
        return f"{self.name} cannot be read ({error.strerror}); {remedy}."

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if self.path == "-":
            return _stdin()
        if stat.S_ISFIFO(os.stat(self.path).st_mode):
            return io.BufferedReader(Pipe(self.path))
        return open(self.path, "rb")

    def _text(self, data: bytes) -> Document | Unreadable:
        def unreadable(sentence: str) -> Unreadable:
            return Unreadable(f"{self.name} {sentence}", len(data))

        if len(data) > MAX_BYTES:
            return unreadable(too_much())
        for beginning, sentence in _OTHER_FORMATS.items():
            if data.startswith(beginning):
                return unreadable(f"{sentence}.")
        encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8-sig")
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            name = encoding.upper().removesuffix("-SIG")
            return unreadable(f"is not {name} at byte {error.start}; convert it, for instance with iconv.")
        if not text.strip():
            return unreadable("holds no text; give one.")
        if "\0" in text:
            return unreadable(f"holds NUL at character {text.index(chr(0))} and is no text; convert it.")
        return Document(self.name, self.name, text, len(data))

    def _lines(self, file: BinaryIO) -> Iterator[Document | Unreadable]:
        line_of: dict[str, int] = {}  # the line that each id was in
        documents = faults = blanks = 0  # the last two count since the last document
        count = 0  # lines that are not blank
        for number, (line, is_whole) in enumerate(lines_of(file), 1):
            is_text, is_own = bool(line.strip()), count % self.every == self.first
            count += is_text
            if not is_text:
                blanks += 1
            elif not is_own:
                blanks = 0
            else:
                found = self._document(line, number, line_of)
                yield found
                if isinstance(found, Document):
                    documents, faults, blanks = documents + 1, 0, 0
                else:
                    faults += 1
            if not is_whole:
                yield Unreadable(f"{self.name} line {number} goes on and on; what may follow is not read.", 0)
                return
            if faults == (_MAX_FAULTS if documents else _MAX_FAULTS_FIRST) or blanks > _MAX_BLANKS:
                yield Unreadable(
                    f"{self.name} holds no document in {faults + blanks:,} lines up to line {number:,} and is read "
                    "no further; give JSON objects, one a line.",
                    0,
                )
                return
        if count == 0:
            yield Unreadable(f"{self.name} holds no document; give JSON objects, one a line.", 0)

    def _document(self, line: bytes, number: int, line_of: dict[str, int]) -> Document | Unreadable:
        if len(line) > MAX_BYTES:
            return Unreadable(f"{self.name} line {number} {too_much()}", len(line))
        try:
            record = parse_record(line, self.text_field)
        except ValueError as error:
            return Unreadable(f"{self.name} line {number} {error}", len(line))
        return self._of_record(record, number, len(line), line_of)

    def _of_record(
        self, record: dict[str, Any], number: int, size: int, line_of: dict[str, int]
    ) -> Document | Unreadable:
        """Returns the document of a record, which is line ``number`` of ``size`` bytes."""
        where = f"{self.name} line {number}"
        try:
            document_id, parts, is_own = self._parse(record, number)
        except ValueError as error:
            return Unreadable(f"{where} {error}", size)
        first = line_of.setdefault(str(document_id), number) if is_own else number
        if first != number:
            return Unreadable(
                f"{where} has the id of line {first}, {short(document_id)}; give each document its own, or none.",
                size,
            )
        return Document.of_parts(document_id, self.name, parts, size, is_own)

    def _parse(self, record: dict[str, Any], number: int) -> tuple[str | int, list[str], bool]:
        parts, document_id = parts_of(record, self.text_field, "--text-field"), record.get("id")
        is_own = document_id is not None
        document_id = document_id if is_own else number
        if isinstance(document_id, bool) or not isinstance(document_id, (str, int)):
            raise ValueError(f"has the id {short(document_id)}; give a string or an integer, or none.")
        check_encodable([str(document_id), *parts])
        return document_id, parts, is_own


def _stdin() -> AbstractContextManager[BinaryIO]:
    """Returns stdin, as a file of our own if it is one.

    A thread that still waits for Python's own when the process ends would be a fatal error.
    """
    try:
        return open(os.dup(sys.stdin.fileno()), "rb")
    except (OSError, ValueError):  # it was replaced by something without a number
        return nullcontext(sys.stdin.buffer)


def lines_of(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yields lines, cut where they are too long, and whether the next line could be found after each."""
    while line := file.readline(MAX_BYTES + 1):
        skipped, last = 0, line
        while len(line) > MAX_BYTES and not last.endswith(b"\n") and skipped <= _MAX_SKIPPED:
            last = file.readline(MAX_BYTES)
            skipped += len(last)
            if not last:
                break
        yield line, skipped <= _MAX_SKIPPED
        if skipped > _MAX_SKIPPED:
            return


def too_much() -> str:
    """Returns the end of a message on a text that is too long."""
    return f"holds more than {MAX_BYTES >> 20} MiB of text; split it."
