"""Turns texts into token ids and back by BART's byte-level BPE, and reads and writes its files."""
