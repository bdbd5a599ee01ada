"""Checkpoints whose files are too large, of another kind than they seem, or contradict each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.hostile.damage import Case, edit, index, put, write

ANSWER = "answer {words} --model {model} --max-new-tokens 2 --question why"
CLASSIFY = "classify {words} --model {model}"
RESUMABLE = "summarize {words} --model {model} --max-new-tokens 2 --output {model}/out.jsonl"
DONE, FAILED = 0, 1
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")


def cases() -> Iterator[Case]:
    yield from _large_files()
    yield from _no_files()
    yield from _strange_names()
    yield from _tokenizers()
    yield from _contradictions()


def _large_files() -> Iterator[Case]:
    for name in (*SETTINGS, *TOKENIZER):
        yield Case(f"{name} of 3 GiB", partial(_lengthen, name), status=FAILED, says=name)
        yield Case(
            f"{name} of 3 GiB, with --output",
            partial(_lengthen, name),
            RESUMABLE,
            status=FAILED,
            says=name,
        )
    yield Case("10 million merges", partial(write, "merges.txt", "a a\n" * 10**7), status=FAILED)
    yield Case("6 million merges", partial(write, "merges.txt", "a a\n" * (6 * 10**6)), status=FAILED)
    for item in ("[]", '""'):
        content = f'{{"x": [{item}{f",{item}" * (24 * 10**6 // (len(item) + 1))}]}}'
        for name in ("config.json", "vocab.json", "tokenizer.json"):
            yield Case(f"{name} of many {item}", partial(write, name, content))
    added = [{"id": 300 + i, "content": f"<{i}>", "special": i % 2 == 0} for i in range(200_000)]
    yield Case("200,000 added tokens by turns", partial(_backend, {"added_tokens": added}), status=FAILED)


def _no_files() -> Iterator[Case]:
    """Puts there what is no file, which would be missed only by its settings."""
    for name in (*SETTINGS, *TOKENIZER, "added_tokens.json", "model.safetensors"):
        for how, make in {
            "dangling": lambda path: path.symlink_to("nowhere"),
            "a loop": lambda path: path.symlink_to(path.name),
            "a directory": Path.mkdir,
            "a pipe": os.mkfifo,
            "a device": lambda path: path.symlink_to("/dev/zero"),
        }.items():
            yield Case(f"{name} {how}", partial(_remake, name, make), status=FAILED, says=name)
    yield Case(
        "config.json /proc/self/mem",
        partial(_remake, "config.json", _memory),
        status=FAILED,
        says="config.json",
    )


def _strange_names() -> Iterator[Case]:
    for name in ("\n", "\x1b[31m", "\0", "x" * 100_000, "\u202e", "a b"):
        shown = ascii(name[:9])
        yield Case(f"tensor {shown}", partial(put, f"led.{name}", torch.ones(1)), status=FAILED)
        yield Case(f"pickled {shown}", partial(put, name, torch.ones(1).long(), pickled=True), status=FAILED)
        yield Case(
            f"shard {shown}",
            partial(index, "model.safetensors.index.json", {"a": f"{name}.bin"}),
            status=FAILED,
        )
        named = {"architectures": [name]}
        yield Case(f"architecture {shown}", partial(edit, "config.json", named))
        yield Case(
            f"architecture {shown} of a classifier", partial(edit, "config.json", named), model="classifier"
        )
        yield Case(f"model_type {shown}", partial(edit, "config.json", {"model_type": name}), status=FAILED)
        for key in ("pad_token", "mask_token"):
            yield Case(f"{key} {shown}", partial(edit, "tokenizer_config.json", {key: name}))
        yield Case(
            f"added token {shown}",
            partial(write, "added_tokens.json", json.dumps({name: 777})),
            status=FAILED,
        )
        yield Case(f"merge {shown}", partial(write, "merges.txt", f"{name} {name}"))
        asked = partial(edit, "generation_config.json", {"suppress_tokens": [name] * 9, name: name})
        yield Case(f"generation setting {shown}", asked)


def _tokenizers() -> Iterator[Case]:
    replace = {"type": "Replace", "pattern": {"String": "."}, "content": "a" * 10}
    yield Case(
        "a normalizer that amplifies",
        partial(_backend, {"normalizer": {"type": "Sequence", "normalizers": [replace] * 7}}),
        status=FAILED,
    )
    for name, values in {
        "normalizer": [replace | {"pattern": {"Regex": ""}}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
        "decoder": [{"type": "Sequence", "decoders": [replace] * 6}, {"type": "Strip", "content": "x", "start": 9}],
        "pre_tokenizer": [{"type": "FixedLength", "length": 0}, {"type": "Sequence", "pretokenizers": []}],
        "model": [
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
            {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?", "continuing_subword_prefix": "##"},
            {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
            {"type": "BPE", "vocab": {"a": 0, "##b": 1}, "merges": ["a ##b"], "continuing_subword_prefix": "é"},
        ],
    }.items():  # fmt: skip
        for value in values:
            kind = value["type"]
            yield Case(
                f"{name} {kind}", partial(_backend, {name: value}), status=FAILED, says="tokenizer.json: "
            )
    ids = [True, "5", None, [5], 2**32 + 5, -1, 1.0, 2**31]
    for value in ids:
        change = partial(edit, "vocab.json", {"a": value})
        yield Case(f"vocab.json a={value}", change, status=FAILED, says="vocab.json: ")


def _contradictions() -> Iterator[Case]:
    swapped = {"bos_token": "</s>", "eos_token": "<s>", "cls_token": "</s>", "sep_token": "<s>"}
    yield Case(
        "swapped special tokens",
        partial(edit, "tokenizer_config.json", swapped),
        status=FAILED,
        says="bos_token_id",
    )
    yield Case(
        "pad_token a",
        partial(edit, "tokenizer_config.json", {"pad_token": "a"}),
        status=FAILED,
        says="pad_token",
    )
    for named in (["LEDForQuestionAnswering"], "LEDForQuestionAnswering", ["LEDForSequenceClassification"]):
        change = partial(edit, "config.json", {"architectures": named})
        yield Case(
            f"no head though {named}", change, ANSWER, status=FAILED if isinstance(named, list) else DONE
        )
    for named in ("LEDForConditionalGeneration", None, ["LEDModel"], [3], {}):
        change = partial(edit, "config.json", {"architectures": named})
        for model in ("qa", "classifier"):
            yield Case(f"summaries of {model}, {named}", change, status=FAILED, model=model)
        yield Case(f"answers of classifier, {named}", change, ANSWER, status=FAILED, model="classifier")
        yield Case(f"answers of qa, {named}", change, ANSWER, status=DONE, model="qa")
        yield Case(f"classes of qa, {named}", change, CLASSIFY, status=FAILED, model="qa")
        yield Case(f"classes, {named}", change, CLASSIFY, status=DONE, model="classifier")
    for labels in ({"0": "a", "1": "a"}, {"0": "a", "00": "b", "1": "c"}, {"0": "a", "٠": "b"}, {}):
        change = partial(edit, "config.json", {"id2label": labels})
        yield Case(f"labels {labels}", change, CLASSIFY, status=FAILED, says="id2label", model="classifier")


def _remake(name: str, make: Callable[[Path], object], directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    make(directory / name)


def _memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def _lengthen(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as file:
        file.truncate(3 * 2**30)


def _backend(changes: dict[str, Any], directory: Path) -> None:
    """A tokenizer.json of the checkpoint's vocabulary, with some of its entries replaced."""
    from led_model.tokenization.tokenizer import LEDTokenizer

    LEDTokenizer.from_pretrained(directory).save_pretrained(directory)
    edit("tokenizer.json", changes, directory)
