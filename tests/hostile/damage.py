"""This module knows what can be done to a checkpoint, and how ``led`` must then end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.processes import Ended

COMMAND = "summarize {words} --model {model} --max-new-tokens 2"

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """Does ``damage`` to a copy of the checkpoint ``model``, on which ``led`` is then called with ``command``.

    ``status`` is how that must end, -1: with any; what ``led`` writes has ``says`` in it.
    """

    name: str
    damage: Damage
    command: str = COMMAND
    status: int = -1
    says: str = ""
    model: str = "model"

    def fault(self, ended: Ended) -> str | None:
        fault = ended.fault_of_command
        if fault is None and self.status >= 0 and ended.status != self.status:
            fault = f"status {ended.status}, not {self.status}: {ended.out[-300:]} {ended.err[-500:]}"
        if fault is None and ended.status and not _is_one_line(ended.err):
            fault = f"not one readable line: {ended.err[-1500:]!r}"
        if fault is None and self.says not in ended.out + ended.err:
            fault = f"does not say {self.says!r}: {ended.out[-300:]} {ended.err[-300:]}"
        return fault


def _is_one_line(text: str) -> bool:
    return text.count("\n") == 1 and len(text) < 3000 and text.rstrip("\n").isprintable()


def write(name: str, content: str | bytes, directory: Path) -> None:
    if name == "model.safetensors.index.json":
        (directory / "model.safetensors").unlink(missing_ok=True)
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    (directory / name).write_bytes(data)


def edit(name: str, settings: dict[str, Any], directory: Path) -> None:
    path = directory / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | settings))


def index(name: str, weight_map: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


def edit_tensor(name: str, edit: Callable[[torch.Tensor], Any], directory: Path, *, pickled: bool) -> None:
    tensors: dict[str, Any] = load_file(directory / "model.safetensors")
    tensors[name] = edit(tensors.get(name, tensors["led.shared.weight"]))
    if pickled:
        pickle(tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors")


def put(name: str, tensor: torch.Tensor, directory: Path, *, pickled: bool = False) -> None:
    tensors = load_file(directory / "model.safetensors") | {name: tensor}
    if pickled or tensor.is_nested:
        pickle(tensors, directory)
    else:
        save_file(tensors, directory / "model.safetensors")


def pickle(content: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")


def cut(name: str, size: int, directory: Path) -> None:
    if name != "model.safetensors":
        pickle(load_file(directory / "model.safetensors"), directory)
    (directory / name).write_bytes((directory / name).read_bytes()[:size])


def short(value: Any) -> str:
    text = str(value).encode("unicode_escape").decode()
    return text if len(text) < 40 else f"{text[:30]}… ({len(text)})"
