"""Checkpoints of which one thing is wild, opened by ``led summarize``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from led_model import LEDConfig
from led_model.cli import main
from tests.hostile.documents import prepare
from tests.hostile.processes import Trial, in_process
from tests.model.small import small_config

DEEP = "[" * 100_000 + "]" * 100_000

Damage = Callable[[Path], None]

_WILD: list[Any] = [
    None, True, "four", "", -1, 0, 3, 1.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30,
    10**8, 20_000, [], [1], ["a"], [[]], [-1], [None], {}, {"a": 1}, [8] * 20_000, "\ud800", "\x00",
]  # fmt: skip


def cases() -> list[tuple[str, Damage]]:
    """All of them, by name, each a function that damages the checkpoint in a directory."""
    return [*_configs(), *_generation_settings(), *_tokenizers(), *_indices(), *_weights(), *_json_files()]


def _configs() -> Iterator[tuple[str, Damage]]:
    names = [*vars(LEDConfig(**small_config(0))), "model_type", "hidden_size"]
    for name in names:
        for value in _WILD:
            yield f"config.json {name}={_short(value)}", partial(_edit, "config.json", {name: value})


def _generation_settings() -> Iterator[tuple[str, Damage]]:
    names = [
        "num_beams", "max_length", "max_new_tokens", "min_length", "length_penalty", "early_stopping", "do_sample",
        "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "encoder_no_repeat_ngram_size", "eos_token_id", "forced_bos_token_id", "decoder_start_token_id",
        "pad_token_id", "num_return_sequences", "suppress_tokens", "typical_p",
    ]  # fmt: skip
    for name in names:
        for value in _WILD:
            settings = {name: value}
            yield (
                f"generation_config.json {name}={_short(value)}",
                partial(_edit, "generation_config.json", settings),
            )


def _tokenizers() -> Iterator[tuple[str, Damage]]:
    names = [
        "pad_token",
        "model_max_length",
        "add_prefix_space",
        "added_tokens_decoder",
        "extra_special_tokens",
    ]
    tokens = [
        {"content": 3}, {"content": "<x>", "lstrip": "no"}, [{"content": None}], {"7": "<x>"}, {"-7": {"content": "x"}},
        {"99999999999": {"content": "x"}}, {"²": {"content": "x"}}, {"3": {"content": "\ud800"}}, [""],
    ]  # fmt: skip
    for name in names:
        for value in [*_WILD, *tokens]:
            yield (
                f"tokenizer_config.json {name}={_short(value)}",
                partial(_edit, "tokenizer_config.json", {name: value}),
            )
    many = {str(300 + i): {"content": f"<{i}>", "special": i % 2 == 0} for i in range(100_000)}
    yield "100,000 added tokens", partial(_edit, "tokenizer_config.json", {"added_tokens_decoder": many})
    yield (
        "100,000 extra tokens",
        partial(_edit, "tokenizer_config.json", {"extra_special_tokens": list(many)}),
    )
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        for content in (
            "",
            "{}",
            "[]",
            '{"a": "b"}',
            '{"a": -1}',
            '{"a": 1e99}',
            DEEP,
            "\x00",
            '{"version": "1.0"}',
        ):
            yield f"{name} {_short(content)}", partial(_write, name, content)


def _indices() -> Iterator[tuple[str, Damage]]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        for value in [
            *_WILD,
            {"a": "config.json"},
            {"a": "../x.bin"},
            {"a": ".."},
            {"a": "x" * 5000 + ".bin"},
        ]:
            yield f"{index} weight_map={_short(value)}", partial(_index, index, value)


def _weights() -> Iterator[tuple[str, Damage]]:
    edits: dict[str, Callable[[torch.Tensor], Any]] = {
        "int64": lambda t: t.long(),
        "int8": lambda t: t.to(torch.int8),
        "bool": lambda t: t > 0,
        "complex": lambda t: t.to(torch.complex64),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "one row": lambda t: t[:1].clone(),
        "no dimension": lambda t: t.sum(),
        "one dimension more": lambda t: t[None].clone(),
        "empty": lambda t: t[:0].clone(),
        "transposed": lambda t: t.t().contiguous() if t.dim() == 2 else t[::2].clone(),
    }
    only_in_a_pickle: dict[str, Callable[[torch.Tensor], Any]] = {
        "stride 0 and huge": lambda t: torch.ones(1).expand(2**20, 2**20),
        "stride 0 of its shape": lambda t: torch.ones(1).expand(t.shape),
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "a number": lambda t: 3,
        "None": lambda t: None,
        "a list": lambda t: [1.0],
        "a parameter": torch.nn.Parameter,
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    }
    names = [
        "led.shared.weight",
        "led.decoder.layers.0.fc1.weight",
        "led.encoder.layers.0.final_layer_norm.bias",
    ]
    for name in [*names, "lm_head.weight"]:
        for how, edit in edits.items():
            yield f"{name} {how}", partial(_edit_tensor, name, edit, pickled=False)
        for how, edit in (edits | only_in_a_pickle).items():
            yield f"pickled {name} {how}", partial(_edit_tensor, name, edit, pickled=True)
    for what, content in {
        "a list": [1],
        "a number": 3,
        "numbers as keys": {1: torch.ones(1)},
        "empty": {},
    }.items():
        yield f"a pickle of {what}", partial(_pickle, content)
    for size in (0, 7, 8, 100):
        for name in ("model.safetensors", "pytorch_model.bin"):
            yield f"{name} of {size} bytes", partial(_cut, name, size)


def _json_files() -> Iterator[tuple[str, Damage]]:
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ):
        for content in (
            DEEP,
            '{"a":' * 5000,
            "",
            "null",
            "3",
            "[]",
            "\x00",
            '"text"',
            "{",
            '{"a": ' + "9" * 5000 + "}",
        ):
            yield f"{name} {_short(content)}", partial(_write, name, content)
        yield f"{name} no UTF-8", partial(_write, name, b"\xff\xfe{}")
        yield f"{name} of 40 MB", partial(_write, name, "[" + "[]," * 13_000_000 + "[]]")


def _write(name: str, content: str | bytes, directory: Path) -> None:
    if name == "model.safetensors.index.json":
        (directory / "model.safetensors").unlink()
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    (directory / name).write_bytes(data)


def _edit(name: str, settings: dict[str, Any], directory: Path) -> None:
    path = directory / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | settings))


def _index(name: str, weight_map: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


def _edit_tensor(name: str, edit: Callable[[torch.Tensor], Any], directory: Path, *, pickled: bool) -> None:
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    tensors[name] = edit(tensors.get(name, tensors["led.shared.weight"]))
    if pickled:
        _pickle(tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors")


def _pickle(content: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")


def _cut(name: str, size: int, directory: Path) -> None:
    if name != "model.safetensors":
        _pickle(load_file(directory / "model.safetensors"), directory)
    (directory / name).write_bytes((directory / name).read_bytes()[:size])


def _short(value: Any) -> str:
    text = str(value).encode("unicode_escape").decode()
    return text if len(text) < 40 else f"{text[:30]}… ({len(text)})"


def run(damage: Damage, scratch: Path) -> tuple[str, str | None]:
    """Opens a copy of the checkpoint ``model`` in ``scratch`` after ``damage`` to it, and writes a few tokens: how that
    ended, and what is wrong with it."""
    directory = scratch / "damaged"
    shutil.copytree(scratch / "model", directory)
    try:
        damage(directory)
        command = [
            "summarize",
            str(scratch / "words.txt"),
            "--model",
            str(directory),
            "--max-new-tokens",
            "2",
        ]
        ended = in_process(lambda: main(command))
        return f"status {ended.status}", ended.fault_of_command
    finally:
        shutil.rmtree(directory)


def trials(scratch: Path) -> Iterator[Trial]:
    prepare(scratch)
    for name, damage in cases():
        yield name, partial(run, damage, scratch)
