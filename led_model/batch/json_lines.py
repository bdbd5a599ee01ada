"""Parses a line of a JSON Lines file; what is wrong with it becomes the end of a sentence."""

from __future__ import annotations

import codecs
import gc
import json
import reprlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from itertools import islice
from typing import Any


def parse_record(line: bytes, field: str) -> dict[str, Any]:
    """Returns the JSON object of a line; messages say that it shall have a ``field``, which is not looked for here.

    Raises:
        ValueError: with the end of a sentence on what is wrong.
    """
    try:
        with _without_collection():
            record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}; convert the file.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error}); repair it.") from None
    except RecursionError:
        raise ValueError("is nested too deep; repair it.") from None
    except ValueError:  # Python's message is for programmers
        raise ValueError("holds a number of thousands of digits; repair it.") from None
    if not isinstance(record, dict):
        raise ValueError(f"holds a {type(record).__name__}; give a JSON object with a {field!r}.")
    return record


def parts_of(record: dict[str, Any], field: str, flag: str) -> list[str]:
    """Returns the texts in a field, which is a string or a list of strings; ``flag`` names the field.

    Raises:
        ValueError: as :func:`parse_record`, when there is no such field, or something else in it.
    """
    if field not in record:
        known = ", ".join(map(short, islice(record, 8))) or "nothing"
        what = flag.removeprefix("--").removesuffix("-field")
        raise ValueError(f"has no {field!r} but {known}; name the {what} with {flag}.")
    text = record[field]
    parts = text if isinstance(text, list) else [text]
    if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(
            f"has no text in {field!r}; give a string that is not blank, or a list of such strings."
        )
    return parts


def check_encodable(texts: Iterable[str]) -> None:
    """Checks that texts can be written as UTF-8.

    Raises:
        ValueError: as :func:`parse_record`.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair; escape the character in full.") from None


def short(value: object) -> str:
    """Returns a value as messages show it, cut in its middle if it is long."""
    return reprlib.repr(value)


@contextmanager
def _without_collection() -> Generator[None, None, None]:
    """Turns garbage collection off, which would scan a million lists again and again while they are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
