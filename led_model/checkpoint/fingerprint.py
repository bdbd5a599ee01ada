"""What tells one checkpoint from another."""

from __future__ import annotations

import hashlib

from led_model.checkpoint.files import SETTINGS, TOKENIZER, read_whole
from led_model.checkpoint.hub import checkpoint_files
from led_model.checkpoint.weights import weight_files

_TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_MOST = {"config.json": SETTINGS, "generation_config.json": SETTINGS} | dict.fromkeys(_TOKENIZER, TOKENIZER)
_BLOCK = 2**20  # bytes of a file of weights that are in memory at a time


def fingerprint(path_or_id: str, revision: str | None = None) -> str:
    """Of the settings, the tokenizer and the weights: 16 hexadecimal digits.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        OSError, ValueError: when a file cannot be read.
    """
    fetch = checkpoint_files(path_or_id, revision)
    digest = hashlib.sha256()  # the fastest that hashlib has, where the processor knows it: 1.4 GB a second
    for name, most in _MOST.items():
        if (path := fetch(name)) is not None:
            content = read_whole(path, most)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for path in weight_files(fetch, path_or_id):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]
