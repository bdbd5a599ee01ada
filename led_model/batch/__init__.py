"""Reads documents, and runs a model over them in batches."""

from led_model.batch.documents import Document
from led_model.batch.scheduling import Outcome, run_documents

__all__ = ["Document", "Outcome", "run_documents"]
