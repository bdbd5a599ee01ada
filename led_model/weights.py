"""Reads a checkpoint's tensors, in every form that transformers has written, and refuses what is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from led_model.files import read_json
from led_model.hub import Fetch, first_line, what_else_is_in
from led_model.schema import TEXT, check_values, table_of

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LONGEST_NAME = 255  # bytes; file systems refuse longer ones by an error of their own
_INDEX_RULES = {"weight_map": table_of(TEXT, TEXT, "shards by tensor names")}


def read_tensors(fetch: Fetch, source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, on the CPU, without gradients.

    Raises:
        FileNotFoundError: when a file is not there.
        ValueError: when one cannot be read, or holds anything but dense floating point tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(fetch, source):
        tensors.update(_read_file(path))
    return tensors


def weight_files(fetch: Fetch, source: str | os.PathLike[str]) -> list[Path]:
    """The file of weights, or all shards.

    Raises:
        FileNotFoundError: when one is not there.
        ValueError: when the index of the shards cannot be read.
    """
    for name in WEIGHT_FILES:
        if (path := fetch(name)) is not None:
            is_index = name.endswith(".index.json")
            return [required(fetch, shard, source) for shard in _shards(path)] if is_index else [path]
    raise FileNotFoundError(
        f"{source} holds no weights; it needs one of {', '.join(WEIGHT_FILES)}: {what_else_is_in(source)}."
    )


def required(fetch: Fetch, name: str, source: str | os.PathLike[str]) -> Path:
    path = fetch(name)
    if path is None:
        raise FileNotFoundError(f"{source} holds no {name}; {what_else_is_in(source)}.")
    return path


def _shards(path: Path) -> list[str]:
    index = read_json(path)
    try:
        check_values({"weight_map": index.get("weight_map")}, _INDEX_RULES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        is_name = Path(shard).name == shard and len(shard.encode(errors="replace")) <= _LONGEST_NAME
        if not is_name or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{path} names {shard[:99]!r}, which is no file of weights beside it; fetch it again."
            )
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files, both libraries and pickle raise whatever befell them
        raise ValueError(f"{path} holds no readable weights ({first_line(error)}); fetch it again.") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} holds no plain dict of tensors; save the model's state_dict.")
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_quantized:
            kind = str(tensor.layout if tensor.dtype in WEIGHT_DTYPES else tensor.dtype).removeprefix(
                "torch."
            )
            raise ValueError(
                f"{path} holds {name} as {kind}; give weights as dense float32, float16, bfloat16 or float64."
            )
        if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} holds {name} without all of its numbers; save the model's state_dict.")
    return {name: tensor.detach() for name, tensor in tensors.items()}
