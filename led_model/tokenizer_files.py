"""Reads a checkpoint's tokenizer files, in the forms that transformers has written over the years."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from led_model.checkpoint import Fetch, checkpoint_files
from led_model.config import read_json

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


@dataclass
class TokenizerFiles:
    """The tokenizer with all its added tokens, the names' special tokens, and the longest text or ``None``."""

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    model_max_length: int | None


def read_tokenizer_files(path_or_id: str | os.PathLike[str], revision: str | None) -> TokenizerFiles:
    """See ``LEDTokenizer.from_pretrained``."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ImportError("text needs the tokenizers library: pip install 'led-kernels[text]'.") from None
    fetch = checkpoint_files(path_or_id, revision)
    settings = _settings(fetch)
    tokenizer = _backend(fetch, path_or_id)
    if settings.get("add_prefix_space") is not None and hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):
        tokenizer.pre_tokenizer.add_prefix_space = settings["add_prefix_space"]
    special_tokens = SPECIAL_TOKENS | {
        name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name) is not None
    }
    for token, token_id in _added_tokens(tokenizer, settings, special_tokens.values()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if token_id is not None and tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{path_or_id} gives added token {token.content!r} the id {token_id}, but in its vocabulary it "
                f"becomes {tokenizer.token_to_id(token.content)}; fetch the tokenizer's files again, together."
            )
    missing = [t for t in dict.fromkeys(special_tokens.values()) if tokenizer.token_to_id(t) is None]
    if missing:
        raise ValueError(
            f"the vocabulary of {path_or_id} lacks {', '.join(missing)}; LED needs BART's vocabulary."
        )
    longest = settings.get("model_max_length")
    return TokenizerFiles(tokenizer, special_tokens, int(longest) if longest and longest < 10**20 else None)


def _backend(fetch: Fetch, source: object) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if (path := fetch("tokenizer.json")) is not None:
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no readable tokenizer ({error}); fetch it again.") from None
    vocab, merges = fetch("vocab.json"), fetch("merges.txt")
    if vocab is None or merges is None:
        raise FileNotFoundError(
            f"{source} holds no tokenizer.json, nor vocab.json with merges.txt; copy the tokenizer's files there."
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{vocab} and {merges} are no readable BPE ({error}); fetch them again.") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _settings(fetch: Fetch) -> dict[str, Any]:
    """tokenizer_config.json, completed from the two files that older checkpoints have beside it."""

    def read(name: str) -> dict[str, Any]:
        path: Path | None = fetch(name)
        return {} if path is None else read_json(path)

    settings = read("tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read("special_tokens_map.json")
        settings["added_tokens"] = read("added_tokens.json")
    return settings


def _added_tokens(
    tokenizer: Tokenizer, settings: Mapping[str, Any], named: Iterable[str]
) -> Iterator[tuple[AddedToken, int | None]]:
    """What is still to be added, in this order, with the id it must get where a file says one."""
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else extra
    special = {*named, *map(_content, extra)}
    described = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted(((int(key), token) for key, token in described.items()), key=itemgetter(0)):
        is_special = token.get("special", False) or token["content"] in special
        yield _as_added_token(token, is_special), token_id
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content, token_id in sorted((settings.get("added_tokens") or {}).items(), key=itemgetter(1)):
        if content not in known:
            yield _as_added_token(content, content in special), token_id
            known.add(content)
    defaults = [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is not None]
    given = [settings[name] for name in SPECIAL_TOKENS if settings.get(name) is not None]
    for token in [*given, *extra, *(token for token in defaults if token in special)]:
        if _content(token) not in known:
            yield _as_added_token(token, special=True), None
            known.add(_content(token))


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _as_added_token(token: str | Mapping[str, Any], special: bool) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
    return AddedToken(token["content"], special=special, **flags)
