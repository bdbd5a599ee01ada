"""Reads documents, and runs a model over them in batches; names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from led_model.batch.callables import Answerer, Classifier, Summarizer
    from led_model.batch.documents import Document
    from led_model.batch.scheduling import Outcome, run_documents

_MODULE_OF = {
    "Answerer": "led_model.batch.callables",
    "Classifier": "led_model.batch.callables",
    "Document": "led_model.batch.documents",
    "Outcome": "led_model.batch.scheduling",
    "Summarizer": "led_model.batch.callables",
    "run_documents": "led_model.batch.scheduling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'led_model.batch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


__all__ = ["Answerer", "Classifier", "Document", "Outcome", "Summarizer", "run_documents"]
