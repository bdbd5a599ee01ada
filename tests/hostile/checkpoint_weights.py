"""Checkpoints whose weights claim more than they hold, are of another kind, or overflow."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.damage import COMMAND, Case, edit, pickle, put, write

DONE, FAILED, SOME_FAILED = 0, 1, 3


def cases() -> Iterator[Case]:
    yield from _large_weights()
    yield from _strange_weights()
    yield from _overflow()


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


def _strange_weights() -> Iterator[Case]:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield Case(
        "a nested tensor", partial(put, "led.shared.weight", nested), status=FAILED, says="nested tensor"
    )
    yield Case("TorchScript", _script, status=FAILED, says="state_dict as safetensors")
    for content in (
        b"\x80\x04cos\nsystem\n.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x02]q\x00.",
        b"(" * 10**6,
    ):
        says = "no readable weights"
        yield Case(f"a pickle {content[:9]!r}", partial(_replace_weights, content), status=FAILED, says=says)
    yield Case("a legacy file", _legacy, status=DONE)
    yield Case("a legacy file of 2**50 numbers", _large_legacy, status=FAILED)
    yield Case("a tensor in two shards", partial(_shards, True), status=FAILED, says="as another shard does")
    yield Case("a tensor in no shard", partial(_shards, False), status=FAILED, says="which no shard holds")


def _overflow() -> Iterator[Case]:
    for name in ("decoder.layers.0.fc2.weight", "decoder.embed_positions.weight"):
        change = partial(_edit_all, name, lambda t: torch.full_like(t, 1e38))
        for how in ("", " --num-beams 2", " --do-sample --top-k 5"):
            yield Case(f"{name} 1e38{how}", change, COMMAND + how, status=SOME_FAILED, says="overflow")
    yield Case(
        "the decoder x 1e25", partial(_edit_all, "decoder.layers", lambda t: t * 1e25), status=SOME_FAILED
    )
    for value in ("nan", "inf", "-inf"):
        change = partial(_edit_all, "final_logits_bias", lambda t, value=value: t + float(value))
        # -inf forbids a token, and that all are forbidden only writing will tell
        yield Case(f"final_logits_bias {value}", change, status=SOME_FAILED if value == "-inf" else FAILED)


def _edit_all(part: str, change: Callable[[torch.Tensor], torch.Tensor], directory: Path) -> None:
    """Edits all tensors in whose name ``part`` is."""
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: change(tensor) for name, tensor in tensors.items() if part in name}
    save_file(tensors, directory / "model.safetensors")


def _replace_weights(content: bytes, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)


def _script(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(directory / "pytorch_model.bin")


def _legacy(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _large_legacy(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save({"x": torch.ones(12345)}, path, _use_new_zipfile_serialization=False)
    count = b"\x8a\x07" + (2**50).to_bytes(7, "little")
    path.write_bytes(path.read_bytes().replace(b"M90", count))


def _shards(twice: bool, directory: Path) -> None:
    """Writes two shards, with a tensor in both, or in neither though the index has it."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    first, second = names[:9], names[9 - twice :]
    weight_map: dict[str, Any] = {}
    for shard, part in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    weight_map |= {} if twice else {"led.x": "a.safetensors"}
    write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}), directory)


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
    """Writes a directory of a zip archive that says one small entry again and again."""
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
