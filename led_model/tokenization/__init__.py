"""BART's byte-level BPE: its files, and what goes in and out of it."""
