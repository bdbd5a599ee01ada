"""Cuts files of documents into shards of bounded size, the same ones each time, of which each can be read by itself."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from led_model.batch.documents import MAX_BYTES, Document, Source, Unreadable, lines_of, too_much

SHARD_ROWS = 256
"""So many lines, rows or files make a shard at most, unless another number is asked for."""

_BLOCK = 2**24  # bytes of a file whose lines are counted at a time
_NEWLINE = ord("\n")
_ROWS_AT_ONCE = 256


@dataclass
class Lines(Source):
    """Reads ``count`` lines of a file of JSON lines, from line number ``first_line`` on, which begins at ``offset``.

    An id that another shard of the file has, too, is not noticed.
    """

    is_jsonl: bool = True
    first_line: int = 1
    offset: int = 0
    count: int = 0

    def documents(self) -> Iterator[Document | Unreadable]:
        line_of: dict[str, int] = {}
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            number = self.first_line - 1
            for number, (line, is_whole) in enumerate(islice(lines_of(file), self.count), self.first_line):
                if line.strip():
                    yield self._document(line, number, line_of)
                if not is_whole:
                    yield Unreadable(
                        f"{self.name} line {number} goes on and on; what follows is not read.", 0
                    )
                    return
            if number + 1 < self.first_line + self.count:
                raise OSError(errno.EIO, f"it ends after line {number:,} and was longer before", self.path)


@dataclass
class Rows(Source):
    """Reads ``count`` rows of a Parquet file, of which ``first_row`` is the first, counted from 1.

    A row is read as a JSON line is: the text from ``text_field``, which may be stored as bytes of UTF-8, and ``id`` if
    the file has such a column, else the number of the row. pandas stores integers beside missing ones as floats.
    """

    is_jsonl: bool = True
    first_row: int = 1
    count: int = 0

    def documents(self) -> Iterator[Document | Unreadable]:
        line_of: dict[str, int] = {}
        for number, row in enumerate(self._rows(), self.first_row):
            if isinstance(document_id := row.get("id"), float) and document_id.is_integer():
                row["id"] = int(document_id)
            try:
                size = self._decode(row)
            except UnicodeDecodeError as error:
                yield Unreadable(
                    f"{self.name} line {number} is not UTF-8 at byte {error.start}; convert it.", 0
                )
                continue
            if size > MAX_BYTES:
                yield Unreadable(f"{self.name} line {number} {too_much()}", size)
                continue
            yield self._of_record(row, number, size, line_of)

    def _decode(self, row: dict[str, Any]) -> int:
        """Makes text of a row's bytes, and returns how many bytes its text has."""
        text = row.get(self.text_field)
        if isinstance(text, bytes):
            row[self.text_field] = text.decode()
            return len(text)
        parts = text if isinstance(text, list) else [text]
        return sum(len(part.encode()) for part in parts if isinstance(part, str))

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yields rows as dicts.

        Raises:
            OSError: when the file cannot be read, or not to its end.
        """
        try:
            yield from self._rows_of_groups()
        except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
            if isinstance(error, OSError) and error.strerror:
                raise
            raise OSError(errno.EIO, str(error).splitlines()[0], self.path) from error

    def _rows_of_groups(self) -> Iterator[dict[str, Any]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.path) as file:
            columns = [name for name in ("id", self.text_field) if name in file.schema_arrow.names]
            groups, before, start = [], 0, 0
            for group in range(file.num_row_groups):
                end = before + file.metadata.row_group(group).num_rows
                if before < self.first_row - 1 + self.count and end >= self.first_row:
                    start = start if groups else before
                    groups.append(group)
                before = end
            skip, left = self.first_row - 1 - start, self.count
            for batch in file.iter_batches(_ROWS_AT_ONCE, groups, columns):
                # Of the rows before the first one no Python objects are made.
                wanted = batch.slice(min(skip, batch.num_rows), left)
                yield from wanted.to_pylist()
                skip, left = max(skip - batch.num_rows, 0), left - wanted.num_rows
                if not left:
                    return


Sources: TypeAlias = tuple[Source, ...]


def cut_shards(sources: Sequence[Source], size: int | None = None) -> Iterator[Sources]:
    """Yields what each shard reads: ``size`` (256) lines or rows of a file at most, or as many files of one text.

    Raises:
        OSError, ValueError: when a file cannot be read.
    """
    size = size or SHARD_ROWS
    texts: list[Source] = []
    for source in sources:
        if is_parquet(source):
            yield from _cut_rows(source, size)
        elif source.is_jsonl:
            yield from _cut_lines(source, size)
        else:
            texts.append(source)
            if len(texts) == size:
                yield tuple(texts)
                texts = []
    if texts:
        yield tuple(texts)


def is_parquet(source: Source) -> bool:
    """Returns whether a file's name says that it is Parquet."""
    return source.path.lower().endswith(".parquet")


def _cut_rows(source: Source, size: int) -> Iterator[Sources]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(source.path) as file:
        total = file.metadata.num_rows
    for first in range(0, total, size):
        count = min(size, total - first)
        yield (Rows(source.path, text_field=source.text_field, first_row=first + 1, count=count),)


def _cut_lines(source: Source, size: int) -> list[Sources]:
    """Reads the file once, for where its lines begin."""

    def lines(first_line: int, offset: int, count: int) -> Sources:
        return (
            Lines(
                source.path, text_field=source.text_field, first_line=first_line, offset=offset, count=count
            ),
        )

    begin = done = count = 0  # the shard's first byte, the block's first byte, and ends of lines so far
    last, has_text = b"", False
    found: list[Sources] = []
    with open(source.path, "rb") as file:
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
            for index in range(size - 1 - count % size, len(ends), size):
                found.append(lines(count + index + 2 - size, begin, size))
                begin = done + int(ends[index]) + 1
            count, done, last = count + len(ends), done + len(block), block[-1:]
            has_text = has_text or bool(block.strip())
    rest = count % size + (last not in (b"", b"\n"))
    if rest:
        found.append(lines(count - count % size + 1, begin, rest))
    return found if has_text else []  # Blank lines alone hold no document.
