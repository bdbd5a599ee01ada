"""Reads a checkpoint's files of settings and of its tokenizer, with a bound on the size of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# These bounds on a file are in mebibytes; the files of large multilingual tokenizers have 20.
SETTINGS_MIB, TOKENIZER_MIB = 4, 24
# A JSON file has no more: a tokenizer has one for each merge, of which large ones have 250,000.
_MAX_BRACKETS = 10**6


def read_bounded(path: Path, max_mib: int = SETTINGS_MIB) -> bytes:
    """Returns the content of a file of at most ``max_mib`` mebibytes.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is longer.
    """
    try:
        with path.open("rb") as file:
            content = file.read((max_mib << 20) + 1)
    except OSError as error:  # reading, unlike opening, does not name the file
        raise OSError(f"{path} cannot be read ({error.strerror}); fetch it again.") from None
    if len(content) > max_mib << 20:
        raise ValueError(f"{path} has more than {max_mib} MiB; fetch it again.")
    return content


def read_json(path: Path, max_mib: int = SETTINGS_MIB) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        OSError, ValueError: as for :func:`read_bounded`, and when the file is not a JSON object.
    """
    content = read_bounded(path, max_mib)
    # Each list or object takes a third of a microsecond and 64 bytes.
    if content.count(b"[") + content.count(b"{") > _MAX_BRACKETS:
        raise ValueError(f"{path} has more than {_MAX_BRACKETS:,} lists and objects; fetch it again.")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON (nested too deep); fetch it again.") from None
    except ValueError as error:  # it is not JSON or not UTF-8, or holds a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch it again.")
    return values
