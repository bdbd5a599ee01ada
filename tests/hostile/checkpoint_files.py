"""Checkpoints whose files are too large, of another kind than they seem, or contradict each other."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.damage import Case, edit, pickle, write

ANSWER = "answer {words} --model {model} --max-new-tokens 2 --question why"
CLASSIFY = "classify {words} --model {model}"
RESUMABLE = "summarize {words} --model {model} --max-new-tokens 2 --output {model}/out.jsonl"
DONE, FAILED = 0, 1
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")


def cases() -> Iterator[Case]:
    yield from _large_files()
    yield from _large_weights()


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
    for item in ("{}", "[]", "0", '""', "1e1"):
        content = f'{{"x": [{item}{f",{item}" * (24 * 10**6 // (len(item) + 1))}]}}'
        for name in ("config.json", "vocab.json", "tokenizer.json"):
            yield Case(f"{name} of many {item}", partial(write, name, content))
    added = [{"id": 300 + i, "content": f"<{i}>", "special": i % 2 == 0} for i in range(200_000)]
    yield Case("200,000 added tokens by turns", partial(_backend, {"added_tokens": added}), status=FAILED)


def _large_weights() -> Iterator[Case]:
    for count in (1000, 10_000):
        yield Case(f"{count} layers of one empty tensor", partial(_empty_layers, count), status=FAILED)
    for count in (300_000, 1_400_000):
        yield Case(f"{count:,} empty tensors", partial(_many_tensors, count), status=FAILED)
        yield Case(f"an archive of {count:,} entries", partial(_many_entries, count), status=FAILED)
    yield Case("a header of 4 GiB", _long_header, status=FAILED)
    yield Case("200 layers of one storage", _one_storage, status=FAILED)
    yield Case("a deflated archive", _deflated, status=FAILED)
    yield Case("a directory of 3 GiB in an archive", _long_directory, status=FAILED)


def _lengthen(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as file:
        file.truncate(3 * 2**30)


def _backend(changes: dict[str, Any], directory: Path) -> None:
    """A tokenizer.json of the checkpoint's vocabulary, with some of its entries replaced."""
    from led_model.tokenizer import LEDTokenizer

    LEDTokenizer.from_pretrained(directory).save_pretrained(directory)
    edit("tokenizer.json", changes, directory)


def _empty_layers(count: int, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"led.encoder.layers.{i}.x": torch.empty(0) for i in range(2, count)}
    save_file(tensors, directory / "model.safetensors")
    edit("config.json", {"encoder_layers": count, "attention_window": 8}, directory)


def _many_tensors(count: int, directory: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"led.{i}": empty for i in range(count)}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _long_header(directory: Path) -> None:
    with (directory / "model.safetensors").open("wb") as file:
        file.write((4 * 2**30).to_bytes(8, "little"))
        file.truncate(5 * 2**30)


def _many_entries(count: int, directory: Path) -> None:
    """A directory of a zip archive that says one small entry again and again."""
    pickle({"x": torch.ones(1)}, directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    content = path.read_bytes()
    entry = content[start : content.index(b"PK\x01\x02", start + 4)]
    end = b"PK\x05\x06" + bytes(4) + min(count, 0xFFFF).to_bytes(2, "little") * 2
    end += (len(entry) * count).to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)
    path.write_bytes(content[:start] + entry * count + end)


def _long_directory(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with (directory / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(3 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(
            b"PK\x05\x06" + bytes(4) + b"\1\0\1\0" + (3 * 2**30 - 8).to_bytes(4, "little") + b"\4" + bytes(5)
        )


def _one_storage(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    wide = torch.zeros(2**21)
    model = {f"led.encoder.layers.{i}.fc1.weight": wide.view(2**10, 2**11) for i in range(200)}
    pickle(tensors | model, directory)


def _deflated(directory: Path) -> None:
    pickle(load_file(directory / "model.safetensors") | {"x": torch.zeros(2**18)}, directory)
    path = directory / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
