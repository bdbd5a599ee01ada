"""Carries a checkpoint's tokenizer over to one that reads longer texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from led_model.checkpoint.files import TOKENIZER_MIB, read_bounded, read_json
from led_model.checkpoint.hub import Fetch

CONFIG = "tokenizer_config.json"
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "bpe.codes",
)  # fmt: skip
TOKENIZER_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json", *_VOCABULARIES)
# transformers takes the tokenizer of the model's type where no class is named.
_CLASSES = {
    "bart": "LEDTokenizer",  # BART's, which also pads a mask of global tokens
    "bert": "BertTokenizer",
    "camembert": "CamembertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
_OF_BART = [f"{name}Tokenizer{kind}" for name in ("Bart", "Roberta") for kind in ("", "Fast")]


def carry_tokenizer(fetch: Fetch, directory: Path, model_type: str, longest: int) -> bool:
    """Copies the tokenizer's files, for texts of up to ``longest`` tokens, and tells whether there is a tokenizer.

    Args:
        fetch: finds the source's files.
        directory: where they go.
        model_type: the source's.

    Raises:
        OSError, ValueError: when a file cannot be read.
    """
    found = {name: path for name in TOKENIZER_FILES if (path := fetch(name)) is not None}
    if not found.keys() & set(_VOCABULARIES):
        return False
    for name, path in found.items():
        shutil.copyfile(path, directory / name)
    settings = read_json(found[CONFIG], TOKENIZER_MIB) if CONFIG in found else {}
    settings["model_max_length"] = longest
    if (name := _CLASSES.get(model_type)) is not None:
        stated = settings.get("tokenizer_class")
        # transformers 5 calls BART's tokenizer RoBERTa's, which is the same.
        is_bart = model_type == "bart" and stated in _OF_BART
        settings["tokenizer_class"] = name if is_bart else stated or name
    _write(directory / CONFIG, settings)
    if "tokenizer.json" in found:
        stored = read_json(found["tokenizer.json"], TOKENIZER_MIB)
        if stored.get("truncation") is not None:  # to what the source's model reads
            _write(directory / "tokenizer.json", stored | {"truncation": None})
    return True


def sep_token_id(fetch: Fetch) -> int | None:
    """Returns the id of the token that ends a part of a BERT's text, ``None`` when no file tells.

    Raises:
        OSError, ValueError: when a file cannot be read.
    """
    token: Any = None
    for name in (CONFIG, "special_tokens_map.json"):
        if token is None and (path := fetch(name)) is not None:
            token = read_json(path, TOKENIZER_MIB).get("sep_token")
    token = token.get("content") if isinstance(token, dict) else token or "[SEP]"
    if (path := fetch("vocab.txt")) is not None:
        tokens = read_bounded(path, TOKENIZER_MIB).decode("utf-8", "replace").splitlines()
        return tokens.index(token) if token in tokens else None
    if (path := fetch("tokenizer.json")) is None:
        return None
    added = read_json(path, TOKENIZER_MIB).get("added_tokens")
    ids = [
        entry.get("id") for entry in added or [] if isinstance(entry, dict) and entry.get("content") == token
    ]
    return ids[0] if ids and isinstance(ids[0], int) else None


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
