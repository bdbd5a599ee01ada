"""Reads a checkpoint's tokenizer files, in the forms that transformers has written over the years."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from led_kernels.extras import install_extra
from led_model.checkpoint.files import TOKENIZER_MIB, read_json
from led_model.checkpoint.hub import Fetch, checkpoint_files, what_else_is_in
from led_model.schema import (
    BOOLEAN,
    LARGEST,
    STRING,
    TOKEN_ID,
    Rule,
    check_values,
    list_of,
    mapping_of,
    number,
    quoted,
)
from led_model.tokenization.tokenizer_json import (
    TOKEN,
    check_id,
    library_errors,
    read_tokenizer_json,
    read_vocabulary,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}

# This bounds added tokens times calls that add some, as each call indexes all tokens, in a microsecond each.
_MAX_WORK = 3 * 10**6
_TOKEN = STRING | TOKEN
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_ID_TEXT = Rule(
    "an id", lambda key: isinstance(key, str) and key.isdecimal() and len(key) < 11 and int(key) <= LARGEST
)
_TOKENS = (list_of(_TOKEN, "tokens") | mapping_of(STRING, _TOKEN, "tokens by name")).optional
_RULES = dict.fromkeys(SPECIAL_TOKENS, _TOKEN.optional) | {
    "add_prefix_space": BOOLEAN.optional,
    "model_max_length": number(1).optional,
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
    "added_tokens_decoder": mapping_of(_ID_TEXT, _TOKEN, "tokens by their ids").optional,
    "added_tokens": mapping_of(STRING, TOKEN_ID, "ids by tokens").optional,
}


@dataclass
class TokenizerFiles:
    """Holds a tokenizer with all its added tokens, its special tokens by name, and its longest text or ``None``."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    model_max_length: int | None


def read_tokenizer_files(
    path_or_id: str | os.PathLike[str], revision: str | None, hub_options: Mapping[str, Any] | None = None
) -> TokenizerFiles:
    """Reads a checkpoint's tokenizer; see ``LEDTokenizer.from_pretrained``."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ImportError(f"text needs the tokenizers library; {install_extra('text')}.") from None
    fetch = checkpoint_files(path_or_id, revision, hub_options)
    settings = _settings(fetch)
    try:
        check_values(settings, _RULES)
    except ValueError as error:
        raise ValueError(f"tokenizer_config.json of {path_or_id}, or a file beside it: {error}") from None
    tokenizer = _backend(fetch, path_or_id)
    if settings.get("add_prefix_space") is not None and hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):
        tokenizer.pre_tokenizer.add_prefix_space = settings["add_prefix_space"]
    special_tokens = SPECIAL_TOKENS | {
        name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name) is not None
    }
    added = list(_added_tokens(tokenizer, settings, special_tokens.values()))
    groups = [
        (is_special, [token for token, _ in tokens])
        for is_special, tokens in groupby(added, key=lambda item: item[0].special)
    ]
    if len(groups) * len(added) > _MAX_WORK:
        raise ValueError(
            f"{path_or_id} has {len(added):,} added tokens, of which special and others alternate {len(groups):,} "
            "times, and would be read for minutes; keep those that are in use."
        )
    with library_errors(f"{path_or_id} has added tokens that cannot be added", "fetch its tokenizer again"):
        for is_special, tokens in groups:
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(tokens)
    for token, token_id in added:
        if token_id is not None:
            check_id(tokenizer, token.content, token_id, path_or_id)
    missing = [t for t in dict.fromkeys(special_tokens.values()) if tokenizer.token_to_id(t) is None]
    if missing:
        raise ValueError(
            f"the vocabulary of {path_or_id} lacks {', '.join(map(quoted, missing))}; LED needs BART's vocabulary."
        )
    _check_ids(fetch, tokenizer, special_tokens, path_or_id)
    longest = settings.get("model_max_length")
    return TokenizerFiles(tokenizer, special_tokens, int(longest) if longest and longest < 10**20 else None)


def _check_ids(
    fetch: Fetch, tokenizer: Tokenizer, special_tokens: Mapping[str, str], source: str | os.PathLike[str]
) -> None:
    """Checks the special tokens' ids against those of config.json, where there are any.

    Where the two contradict each other, a text would end at another token, and padding would be read.

    Raises:
        ValueError: naming the token and both ids.
    """
    path = fetch("config.json")
    stated = read_json(path) if path is not None else {}
    for name in ("bos_token", "eos_token", "pad_token"):
        stated_ids = stated.get(f"{name}_id")
        ids = stated_ids if isinstance(stated_ids, list) else [stated_ids]
        token, token_id = special_tokens[name], tokenizer.token_to_id(special_tokens[name])
        if all(map(TOKEN_ID.accepts, ids)) and ids and token_id not in ids:
            raise ValueError(
                f"{name}_id in config.json of {source} is {reprlib.repr(stated_ids)}, but its tokenizer's {name} "
                f"{quoted(token)} has the id {token_id}; make them agree."
            )


def _backend(fetch: Fetch, source: str | os.PathLike[str]) -> Tokenizer:
    """Returns the library's tokenizer, without tokens that other files add."""
    if (path := fetch("tokenizer.json")) is not None:
        return read_tokenizer_json(path)
    vocab, merges = fetch("vocab.json"), fetch("merges.txt")
    if vocab is None or merges is None:
        remedy = what_else_is_in(source, "copy the tokenizer's files there")
        raise FileNotFoundError(
            f"{source} holds no tokenizer.json, nor vocab.json with merges.txt; {remedy}."
        )
    return read_vocabulary(vocab, merges)


def _settings(fetch: Fetch) -> dict[str, Any]:
    """Returns tokenizer_config.json, completed from the two files that older checkpoints have beside it."""

    def read(name: str) -> dict[str, Any]:
        path: Path | None = fetch(name)
        return {} if path is None else read_json(path, TOKENIZER_MIB)

    settings = read("tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read("special_tokens_map.json")
        settings["added_tokens"] = read("added_tokens.json")
    return settings


def _added_tokens(
    tokenizer: Tokenizer, settings: Mapping[str, Any], named: Iterable[str]
) -> Iterator[tuple[AddedToken, int | None]]:
    """Yields the tokens still to be added, in order, each with the id that it must get where a file says one."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    special = {*named, *map(_content, extra)}
    described = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted(((int(key), token) for key, token in described.items()), key=itemgetter(0)):
        flagged = isinstance(token, Mapping) and token.get("special", False)
        is_special = flagged or _content(token) in special
        yield _as_added_token(token, is_special), token_id
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {_content(token) for token in described.values()}
    for content, token_id in sorted((settings.get("added_tokens") or {}).items(), key=itemgetter(1)):
        if content not in known:
            yield _as_added_token(content, content in special), token_id
            known.add(content)
    there = [t for t in SPECIAL_TOKENS.values() if t in known or tokenizer.token_to_id(t) is not None]
    given = [settings[name] for name in SPECIAL_TOKENS if settings.get(name) is not None]
    for token in [*given, *extra, *(token for token in there if token in special)]:
        if _content(token) not in known:
            yield _as_added_token(token, special=True), None
            known.add(_content(token))


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _as_added_token(token: str | Mapping[str, Any], special: bool) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    flags = {key: token[key] for key in _FLAGS if key in token}
    return AddedToken(token["content"], special=special, **flags)
