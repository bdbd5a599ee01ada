"""Checks the texts, token ids and lengths that a tokenizer is given, before the library behind it fails on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from led_model.schema import check_values, integer

_LENGTHS = {"max_length": integer(0).optional, "pad_to_multiple_of": integer(0).optional}
_LARGEST_ID = 2**32 - 1  # the library takes no larger ones


def texts_of(name: str, value: Any) -> list[str]:
    """Returns a list of a text or of several.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise TypeError(f"{name} is a {type(value).__name__}; give a text or a list of texts.")
    texts = list(value)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} holds a {type(text).__name__}; give a text or a list of texts.")
    return texts


def check_lengths(max_length: Any, pad_to_multiple_of: Any) -> None:
    """Checks that lengths are integers of 0 or more, or ``None``.

    Raises:
        ValueError: naming the argument.
    """
    check_values({"max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}, _LENGTHS)


def token_ids_of(value: Any) -> list[int]:
    """Returns a list of the token ids of a tensor, an array, a list or a single id.

    Raises:
        ValueError: for numbers that cannot be ids, and for several rows of ids.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    given = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    try:
        ids = [index(token_id) for token_id in given]
    except TypeError:
        wrong = next(x for x in given if not hasattr(x, "__index__"))
        raise ValueError(
            f"token_ids holds a {type(wrong).__name__}; give whole numbers, and several rows to batch_decode."
        ) from None
    for token_id in ids:
        if not 0 <= token_id <= _LARGEST_ID:
            raise ValueError(
                f"token_ids holds {token_id}; give ids of 0 or more, with the padding token's id in place of -100."
            )
    return ids


def columns_of(encoded: Any) -> dict[str, Any]:
    """Returns the entries of a batch, or of a list of single encodings, by name.

    Raises:
        TypeError: when it is neither.
        ValueError: for encodings that do not have the same entries.
    """
    if isinstance(encoded, Mapping):
        return dict(encoded)
    if not isinstance(encoded, Sequence) or not all(isinstance(row, Mapping) for row in encoded):
        raise TypeError(
            f"encoded is a {type(encoded).__name__}; give what the tokenizer returned, or a list of such."
        )
    names = list(encoded[0]) if encoded else []
    for row in encoded:
        if row.keys() != set(names):
            raise ValueError(
                f"encoded has rows with {', '.join(map(str, names))} and with {', '.join(map(str, row))}; give the "
                "same entries in all."
            )
    return {name: [row[name] for row in encoded] for name in names}
