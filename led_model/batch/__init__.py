"""Reads documents, and runs a model over them in batches."""
