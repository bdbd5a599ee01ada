"""Joins all documents of a command into one, for ``--join``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from led_model.batch.documents import MAX_BYTES, Document, Source, Unreadable, too_much


@dataclass
class Joined:
    """Reads one document, whose parts are those of ``sources`` in order; if one is missing there is no document."""

    sources: Sequence[Source]

    is_jsonl = False  # it is one document, whatever its parts are

    @property
    def size(self) -> int:
        """Returns the number of its bytes, as far as they are known."""
        return sum(source.size for source in self.sources)

    def read(self) -> Iterator[Document | Unreadable]:
        """Yields what is wrong with the parts, and the document unless one is missing."""
        parts: list[str] = []
        size, missing = 0, False
        for source in self.sources:
            for document in source.read():
                if isinstance(document, Unreadable):
                    missing = True
                    yield document
                else:
                    parts += document.parts or [document.text]
                    size += document.size
                if size > MAX_BYTES:
                    yield Unreadable(f"what is joined {too_much()}", size)
                    return
        if missing:
            yield Unreadable("nothing is joined, for a part is missing; repair it or leave it out.", size)
        elif parts:
            name = " + ".join(source.name for source in self.sources)
            yield Document.of_parts(name, name, parts, size)
