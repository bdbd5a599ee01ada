"""Reads a checkpoint's files of settings and of its tokenizer, none of them further than such files reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS, TOKENIZER = 4, 24  # mebibytes of a file at most: large multilingual tokenizers have 20
_MOST_BRACKETS = 10**6  # in a JSON file: one for each merge, of which large tokenizers have 250,000


def read_whole(path: Path, most: int = SETTINGS) -> bytes:
    """The content of a file of at most ``most`` mebibytes.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is longer.
    """
    try:
        with path.open("rb") as file:
            content = file.read((most << 20) + 1)
    except OSError as error:  # reading, unlike opening, does not say what
        raise OSError(f"{path} cannot be read ({error.strerror}); fetch it again.") from None
    if len(content) > most << 20:
        raise ValueError(f"{path} has more than {most} MiB; fetch it again.")
    return content


def read_json(path: Path, most: int = SETTINGS) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: as for :func:`read_whole`, and when the file is not a JSON object.
    """
    content = read_whole(path, most)
    if (
        content.count(b"[") + content.count(b"{") > _MOST_BRACKETS
    ):  # a third of a microsecond and 64 bytes each
        raise ValueError(f"{path} has more than {_MOST_BRACKETS:,} lists and objects; fetch it again.")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON (nested too deep); fetch it again.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch it again.")
    return values
