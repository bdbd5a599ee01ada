"""Computes what tells one checkpoint from another."""

from __future__ import annotations

import hashlib

from led_model.checkpoint.files import SETTINGS_MIB, TOKENIZER_MIB, read_bounded
from led_model.checkpoint.hub import checkpoint_files
from led_model.checkpoint.weights import weight_files

_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_MAX_MIB = {"config.json": SETTINGS_MIB, "generation_config.json": SETTINGS_MIB} | dict.fromkeys(
    _TOKENIZER_FILES, TOKENIZER_MIB
)
_BLOCK = 2**20  # bytes of a file of weights that are read at a time


def fingerprint(path_or_id: str, revision: str | None = None) -> str:
    """Returns 16 hexadecimal digits that depend on the settings, the tokenizer and the weights.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        OSError, ValueError: when a file cannot be read.
    """
    fetch = checkpoint_files(path_or_id, revision)
    digest = hashlib.sha256()  # 1.4 GB a second where the processor has instructions for it
    for name, max_mib in _MAX_MIB.items():
        if (path := fetch(name)) is not None:
            content = read_bounded(path, max_mib)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for path in weight_files(fetch, path_or_id):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]
