"""Checkpoints of which one thing is wild, opened by ``led``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from led_model import LEDConfig
from led_model.cli.parser import main
from tests.hostile import checkpoint_files, checkpoint_weights
from tests.hostile.damage import Case, Damage, cut, edit, edit_tensor, index, pickle, short, write
from tests.hostile.documents import prepare
from tests.hostile.processes import Trial, in_process
from tests.model.small import small_config

DEEP = "[" * 100_000 + "]" * 100_000


_WILD: list[Any] = [
    None, True, "four", "", -1, 0, 3, 1.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30,
    10**8, 20_000, [], [1], ["a"], [[]], [-1], [None], {}, {"a": 1}, [8] * 20_000, "\ud800", "\x00",
]  # fmt: skip


def cases() -> list[Case]:
    wild = [*_configs(), *_generation_settings(), *_tokenizers(), *_indices(), *_weights(), *_json_files()]
    return [
        *(Case(name, damage) for name, damage in wild),
        *checkpoint_files.cases(),
        *checkpoint_weights.cases(),
    ]


def _configs() -> Iterator[tuple[str, Damage]]:
    names = [*vars(LEDConfig(**small_config(0))), "model_type", "hidden_size"]
    for name in names:
        for value in _WILD:
            yield f"config.json {name}={short(value)}", partial(edit, "config.json", {name: value})


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
                f"generation_config.json {name}={short(value)}",
                partial(edit, "generation_config.json", settings),
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
                f"tokenizer_config.json {name}={short(value)}",
                partial(edit, "tokenizer_config.json", {name: value}),
            )
    many = {str(300 + i): {"content": f"<{i}>", "special": i % 2 == 0} for i in range(100_000)}
    yield "100,000 added tokens", partial(edit, "tokenizer_config.json", {"added_tokens_decoder": many})
    yield (
        "100,000 extra tokens",
        partial(edit, "tokenizer_config.json", {"extra_special_tokens": list(many)}),
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
            yield f"{name} {short(content)}", partial(write, name, content)


def _indices() -> Iterator[tuple[str, Damage]]:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        for value in [
            *_WILD,
            {"a": "config.json"},
            {"a": "../x.bin"},
            {"a": ".."},
            {"a": "x" * 5000 + ".bin"},
        ]:
            yield f"{name} weight_map={short(value)}", partial(index, name, value)


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
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    }
    names = [
        "led.shared.weight",
        "led.decoder.layers.0.fc1.weight",
        "led.encoder.layers.0.final_layer_norm.bias",
    ]
    for name in [*names, "lm_head.weight"]:
        for how, change in edits.items():
            yield f"{name} {how}", partial(edit_tensor, name, change, pickled=False)
        for how, change in (edits | only_in_a_pickle).items():
            yield f"pickled {name} {how}", partial(edit_tensor, name, change, pickled=True)
    for what, content in {
        "a list": [1],
        "a number": 3,
        "numbers as keys": {1: torch.ones(1)},
        "empty": {},
    }.items():
        yield f"a pickle of {what}", partial(pickle, content)
    for size in (0, 7, 8, 100):
        for name in ("model.safetensors", "pytorch_model.bin"):
            yield f"{name} of {size} bytes", partial(cut, name, size)


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
            yield f"{name} {short(content)}", partial(write, name, content)
        yield f"{name} no UTF-8", partial(write, name, b"\xff\xfe{}")
        yield f"{name} of 40 MB", partial(write, name, "[" + "[]," * 13_000_000 + "[]]")


def run(case: Case, scratch: Path) -> tuple[str, str | None]:
    """Opens a damaged copy of the checkpoint in ``scratch``: how that ended, and what is wrong with it."""
    directory = scratch / "damaged"
    shutil.copytree(scratch / case.model, directory)
    try:
        case.damage(directory)
        command = case.command.format(words=scratch / "words.txt", model=directory)
        ended = in_process(lambda: main(command.split()))
        return f"status {ended.status}", case.fault(ended)
    finally:
        shutil.rmtree(directory)


def trials(scratch: Path) -> Iterator[Trial]:
    prepare(scratch)
    for case in cases():
        yield case.name, partial(run, case, scratch)
