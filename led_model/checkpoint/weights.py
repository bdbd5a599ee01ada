"""Reads a checkpoint's tensors, in every form that transformers has written, and refuses other contents."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from led_model.checkpoint.files import read_json
from led_model.checkpoint.hub import Fetch, what_else_is_in
from led_model.checkpoint.weight_formats import MAX_TENSORS, names_in_header, read_file
from led_model.schema import STRING, check_values, mapping_of, printable, quoted

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_NAME = 255  # a file's name has no more bytes; file systems refuse longer ones by an error of their own
_MAX_SHARING = 4  # how many tensors may share their numbers: the four embeddings, when they are tied
_INDEX_RULES = {"weight_map": mapping_of(STRING, STRING, "shards by tensor names")}


def read_tensors(
    fetch: Fetch, source: str | os.PathLike[str], left_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Returns every tensor of the checkpoint, on the CPU, without gradients.

    Args:
        left_out: ends of names of tensors that are not wanted, of whatever kind they are.

    Raises:
        FileNotFoundError: when a file is not there.
        ValueError: when one cannot be read, or holds anything but dense floating point tensors, or when shards and
            their index contradict each other.
    """
    index, shards = _weights(fetch, source)
    tensors: dict[str, Tensor] = {}
    named: set[str] = set()
    for path in shards:
        content = read_file(path)
        own = _checked(path, content, left_out)
        named.update(content)
        if twice := tensors.keys() & own.keys():
            raise ValueError(
                f"{path} holds {_one_of(twice)}, as another shard does; fetch the shards again, together."
            )
        tensors |= own
        if len(tensors) > MAX_TENSORS:
            raise ValueError(
                f"{source} has more than {MAX_TENSORS:,} tensors, which no LED has; fetch it again."
            )
    if index is not None and (lost := _weight_map(index).keys() - named):
        raise ValueError(
            f"{index} names {_one_of(lost)}, which no shard holds; fetch the shards again, together."
        )
    return tensors


def tensor_names(fetch: Fetch, source: str | os.PathLike[str]) -> set[str]:
    """Returns the names of the checkpoint's tensors, without reading their numbers where that is possible.

    Raises: as for :func:`read_tensors`.
    """
    names: set[str] = set()
    for path in weight_files(fetch, source):
        in_header = path.suffix == ".safetensors"
        names.update(names_in_header(path) if in_header else _checked(path, read_file(path)))
    return names


def weight_files(fetch: Fetch, source: str | os.PathLike[str]) -> list[Path]:
    """Returns the paths of the file of weights, or of all shards.

    Raises:
        FileNotFoundError: when one is not there.
        ValueError: when the index of the shards cannot be read.
    """
    return _weights(fetch, source)[1]


def required(fetch: Fetch, name: str, source: str | os.PathLike[str], named_by: str = "") -> Path:
    """Returns the path of a file that must be there.

    Raises:
        FileNotFoundError: when it is not.
    """
    path = fetch(name)
    if path is None:
        raise FileNotFoundError(f"{source} holds no {name}{named_by}; {what_else_is_in(source)}.")
    return path


def _weights(fetch: Fetch, source: str | os.PathLike[str]) -> tuple[Path | None, list[Path]]:
    """Returns the index of the shards, if there is one, and the files of weights."""
    for name in WEIGHT_FILES:
        if (path := fetch(name)) is not None:
            if not name.endswith(".index.json"):
                return None, [path]
            shards = sorted(set(_weight_map(path).values()))
            return path, [required(fetch, shard, source, f", which {path.name} names") for shard in shards]
    raise FileNotFoundError(
        f"{source} holds no weights; it needs one of {', '.join(WEIGHT_FILES)}: {what_else_is_in(source)}."
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Returns the names of the shards by the names of their tensors."""
    index = read_json(path)
    try:
        check_values({"weight_map": index.get("weight_map")}, _INDEX_RULES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for shard in set(index["weight_map"].values()):
        is_name = Path(shard).name == shard and len(shard.encode(errors="replace")) <= _MAX_NAME
        if not is_name or not shard.isprintable() or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{path} names {quoted(shard)}, which is no file of weights beside it; fetch it again."
            )
    return index["weight_map"]


def _checked(path: Path, tensors: Any, left_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns what a file holds without gradients, if it is a dict of dense floating point tensors.

    Those whose names end like one of ``left_out`` may be of any kind, and are not returned.

    Raises:
        ValueError: when it is not.
    """
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} holds no plain dict of tensors; save the model's state_dict.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(left_out)}
    for name, tensor in tensors.items():
        kind = _kind(tensor)
        if kind not in WEIGHT_DTYPES:
            raise ValueError(
                f"{path} holds {printable(name)} as {str(kind).removeprefix('torch.')}; give weights as dense float32, "
                "float16, bfloat16 or float64."
            )
        if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path} holds {printable(name)} without all of its numbers; save the model's state_dict."
            )
    if sum(tensor.nbytes for tensor in tensors.values()) > _MAX_SHARING * path.stat().st_size:
        raise ValueError(
            f"{path} holds the same numbers under many names; save the model's state_dict as safetensors."
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _kind(tensor: Tensor) -> Any:
    """Returns the dtype of a dense tensor, or what else a tensor is."""
    if tensor.is_nested:
        return "nested tensor"
    if tensor.layout != torch.strided:
        return tensor.layout
    return tensor.dtype


def _one_of(names: Iterable[str]) -> str:
    return printable(min(names))
