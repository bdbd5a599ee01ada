"""Makes documents of rows, of which each may have a question of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from led_model.batch.documents import Document
from led_model.batch.pieces import Piece, Reader


@dataclass(frozen=True)
class Row(Document):
    """Holds the text of a row, whose number is its id, and the question about it if there is one."""

    question: str | None = None

    @property
    def name(self) -> str:
        return "the text"


@dataclass
class QuestionReader(Reader):
    """Reads each row after its own question."""

    question_name: str = "the question"

    def pieces(self, document: Document) -> list[Piece]:
        question = document.question if isinstance(document, Row) else None
        if question == self.question:
            return super().pieces(document)
        return dataclasses.replace(self, question=question).pieces(document)
