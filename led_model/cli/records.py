"""Makes the records that outputs hold, of one file or of many."""

from __future__ import annotations

from typing import Any

from led_model.batch.documents import Document


def to_record(document: Document, result: dict[str, Any], made_by: dict[str, Any]) -> dict[str, Any]:
    """Returns what an output says of a document."""
    name = {"led": made_by["command"], "id": document.id, "source": document.source}
    return name | result | {"document": document.key, "made_by": made_by}
