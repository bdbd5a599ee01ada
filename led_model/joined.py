"""``--join``: all documents of a command as the parts of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from led_model.documents import Document, Source, Unreadable


@dataclass
class Joined:
    """One document, whose parts are those of ``sources`` in order; with one of them missing there is none."""

    sources: Sequence[Source]

    @property
    def extent(self) -> tuple[int, int]:
        """How many documents there are, one, and their bytes."""
        return 1, sum(source.extent[1] for source in self.sources)

    def read(self) -> Iterator[Document | Unreadable]:
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
        if missing:
            yield Unreadable("nothing is joined, for a part is missing; repair it or leave it out.", size)
        elif parts:
            name = " + ".join(source.name for source in self.sources)
            yield Document.of_parts(name, name, parts, size)
