"""What tells one checkpoint from another without reading all of it."""

from __future__ import annotations

import hashlib

from led_model.hub import checkpoint_files
from led_model.weights import weight_files

_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_BLOCKS, _BLOCK = (
    256,
    4096,
)  # bytes of a file of weights that are read, at even distances: every layer has some


def fingerprint(path_or_id: str, revision: str | None = None) -> str:
    """Of the settings, the tokenizer, and samples of the files of weights: 16 hexadecimal digits.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
    """
    fetch = checkpoint_files(path_or_id, revision)
    digest = hashlib.sha256()
    for name in _SETTINGS:
        if (path := fetch(name)) is not None:
            digest.update(name.encode() + b"\0" + path.read_bytes())
    for path in weight_files(fetch, path_or_id):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * max(size - _BLOCK, 0) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
