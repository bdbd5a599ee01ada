"""Checks a byte-level BPE's tokenizer.json, vocab.json and merges.txt before the library reads them.

The library's other components may end the process, fail at a text instead of here, or make a document of any length
out of a short one.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from led_model.checkpoint.files import TOKENIZER_MIB, read_bounded, read_json
from led_model.checkpoint.hub import first_line
from led_model.schema import (
    ANYTHING,
    BOOLEAN,
    STRING,
    TOKEN_ID,
    Rule,
    check_values,
    list_of,
    mapping_of,
    object_of,
    one_of,
    quoted,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TOKEN = object_of('an object with "content"', {"content": STRING}, dict.fromkeys(_TOKEN_FLAGS, BOOLEAN))
_VOCABULARY = {"vocab": mapping_of(STRING, TOKEN_ID, "ids by tokens")}

_BYTE_LEVEL = object_of(
    "an object of type ByteLevel",
    {"type": one_of("ByteLevel")},
    dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), BOOLEAN),
)


def _single_byte_level(name: str) -> Rule:
    """Returns a rule for ByteLevel, alone or in a sequence of one, as two would spell bytes of bytes."""
    sequence = {"type": one_of("Sequence"), name: list_of(_BYTE_LEVEL, "it", least=1, most=1)}
    return _BYTE_LEVEL | object_of("a Sequence of it alone", sequence)


_RULES = {
    "added_tokens": list_of(
        object_of("", {"content": STRING, "id": TOKEN_ID} | dict.fromkeys(_TOKEN_FLAGS, BOOLEAN)),
        "tokens, each with its id and flags",
    ),
    "normalizer": object_of(
        "an object of type NFC, NFD, NFKC, NFKD or Lowercase",
        {"type": one_of("NFC", "NFD", "NFKC", "NFKD", "Lowercase")},
    ).optional,
    "pre_tokenizer": _single_byte_level("pretokenizers"),
    "decoder": _single_byte_level("decoders"),
}
_MODEL_RULES = _VOCABULARY | {
    "type": one_of("BPE"),
    "merges": list_of(STRING | list_of(STRING, "two tokens", least=2, most=2), "pairs of tokens"),
    "dropout": one_of(None, 0.0, 0),
    "unk_token": STRING.optional,
    "continuing_subword_prefix": one_of(None, ""),
    "end_of_word_suffix": one_of(None, ""),
    "fuse_unk": BOOLEAN,
    "byte_fallback": BOOLEAN,
    "ignore_merges": BOOLEAN,
}


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Returns the byte-level BPE of a tokenizer.json, without its special tokens around a text, padding and truncation.

    Raises:
        ValueError: when it is of another kind, or cannot be read.
    """
    from tokenizers import Tokenizer

    stored = read_json(path, TOKENIZER_MIB)
    shown: dict[str, Any] = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    shown |= {name: stored[name] for name in shown if name in stored}
    model: dict[str, Any] = {"type": "BPE", "vocab": None, "merges": None}
    try:
        check_values(
            {"model": stored.get("model")}, {"model": mapping_of(STRING, ANYTHING, "settings of a BPE")}
        )
        model |= {name: stored["model"][name] for name in _MODEL_RULES if name in stored["model"]}
        check_values(shown, _RULES)
        check_values(model, _MODEL_RULES)
        _check_ids(model["vocab"])
        if (unknown := model.get("unk_token")) is not None and unknown not in model["vocab"]:
            raise ValueError(f"unk_token is {quoted(unknown)}, which vocab lacks; give one of its tokens.")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rest = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "model": model}
    with library_errors(f"{path} is no readable tokenizer", "fetch it again"):
        tokenizer = Tokenizer.from_str(json.dumps(rest | shown))
    for token in shown["added_tokens"]:
        check_id(tokenizer, token["content"], token["id"], path)
    return tokenizer


def read_vocabulary(vocab: Path, merges: Path) -> Tokenizer:
    """Returns the byte-level BPE of vocab.json and merges.txt.

    Raises:
        ValueError: when one cannot be read, or has no meaning.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {"vocab": read_json(vocab, TOKENIZER_MIB)}
    try:
        check_values(ids, _VOCABULARY)
        _check_ids(ids["vocab"])
    except ValueError as error:
        raise ValueError(f"{vocab}: {error}") from None
    read_bounded(merges, TOKENIZER_MIB)
    with library_errors(f"{vocab} and {merges} are no readable BPE", "fetch them again"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check_id(tokenizer: Tokenizer, token: str, token_id: int, source: object) -> None:
    """Checks that the library has given an added token the id that the file says.

    Raises:
        ValueError: when it has not.
    """
    if (found := tokenizer.token_to_id(token)) != token_id:
        raise ValueError(
            f"{source} gives added token {quoted(token)} the id {token_id}, but in its vocabulary it becomes {found}; "
            "fetch the tokenizer's files again, together."
        )


@contextmanager
def library_errors(what: str, remedy: str) -> Generator[None, None, None]:
    """Turns what the library raises, a bare ``Exception`` or what pyo3 makes of a panic, into a ValueError."""
    try:
        yield
    except BaseException as error:
        is_callers = isinstance(error, (TypeError, UnicodeError))  # the caller gave what is no text
        if is_callers or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{what} ({first_line(error)}); {remedy}.") from None


def _check_ids(vocab: Mapping[str, int]) -> None:
    """Checks that no two tokens have the same id.

    Raises:
        ValueError: naming two that have.
    """
    if len(set(vocab.values())) < len(vocab):
        by_id: dict[int, str] = {}
        one, other = next(
            (by_id[token_id], token)
            for token, token_id in vocab.items()
            if by_id.setdefault(token_id, token) != token
        )
        raise ValueError(
            f"{quoted(one)} and {quoted(other)} have the id {vocab[one]}; give each token its own."
        )
