"""BART's vocab.json and merges.txt, which LED uses, rebuilt from the MIT-licensed wheel blingfire 0.1.8.

The wheel holds the tokens of GPT-2 and of RoBERTa in the order of their ids. A token of GPT-2 from id 256 on is the
result of one merge; which one follows from the merges before it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

_SHA256 = {
    "vocab.json": "ed19656ea1707df69134c4af35c8ceda2cc9860bf2c3495026153a133670ab5e",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_GPT2_TOKENS, _ROBERTA_TOKENS = 50257, 50265
_ROBERTA_SPECIAL = {0, 1, 2, 3, *range(50260, 50265)}
_ROBERTA_FIRST_BYTES = 50108  # ids of the bytes 0 to 3, which the wheel does not spell


class Unreachable(Exception):
    """The package index cannot be asked for the wheel."""


def bart_files(directory: Path) -> Path:
    """``directory`` with both files: those already there, or downloaded and rebuilt.

    Raises:
        Unreachable: with pip's last words.
    """
    if all((directory / name).is_file() and _sha256(directory / name) == _SHA256[name] for name in _SHA256):
        return directory
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        gpt2 = _tokens(wheel, "blingfire/gpt2.i2w", _GPT2_TOKENS)
        roberta = _tokens(wheel, "blingfire/roberta.i2w", _ROBERTA_TOKENS)
    (directory / "merges.txt").write_text(_merges(gpt2), encoding="utf-8")
    vocab = json.dumps(_vocab(roberta), ensure_ascii=False, separators=(",", ":"))
    (directory / "vocab.json").write_text(vocab, encoding="utf-8")
    wrong = [name for name in _SHA256 if _sha256(directory / name) != _SHA256[name]]
    assert not wrong, f"{wrong} are not BART's"
    return directory


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--timeout", "10", "--retries", "1"]
    done = subprocess.run(
        [*command, "--dest", str(directory), "blingfire==0.1.8"], capture_output=True, text=True, timeout=120
    )
    wheels = list(directory.glob("blingfire-0.1.8-*.whl"))
    if done.returncode or not wheels:
        raise Unreachable((done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1])
    return wheels[0]


def _tokens(wheel: Path, name: str, count: int) -> list[bytes]:
    """A table in the file: the count, ``count + 1`` offsets, and what lies between them; all little-endian."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(name)
    header = struct.pack("<I", count)
    at = data.find(header)
    while at >= 0:
        start = at + 4 * (count + 2)
        if start <= len(data):
            offsets = struct.unpack_from(f"<{count + 1}I", data, at + 4)
            if offsets[0] == 0 and list(offsets) == sorted(offsets) and start + offsets[-1] <= len(data):
                return [data[start + a : start + b] for a, b in pairwise(offsets)]
        at = data.find(header, at + 1)
    raise AssertionError(f"{name} holds no table of {count} tokens")


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_CHARACTERS = _byte_characters()


def _spell(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _merges(tokens: list[bytes]) -> str:
    merged = tokens[256:-1]  # the last one is <|endoftext|>
    rank = {token: place for place, token in enumerate(merged)}
    lines = ["#version: 0.2"]
    for token in merged:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, len(merged)) for a, b in pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        lines.append(" ".join(map(_spell, parts)))
    return "\n".join(lines) + "\n"


def _vocab(tokens: list[bytes]) -> dict[str, int]:
    vocab = {}
    for token_id, token in enumerate(tokens):
        first_byte = token_id - _ROBERTA_FIRST_BYTES
        if token_id in _ROBERTA_SPECIAL:
            vocab[token.decode()] = token_id
        else:
            vocab[_CHARACTERS[first_byte] if 0 <= first_byte < 4 else _spell(token)] = token_id
    return vocab


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
