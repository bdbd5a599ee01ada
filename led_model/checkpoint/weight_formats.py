"""Opens and writes files of weights; before they are opened, their headers are checked.

Reading one takes no more memory than it is long.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from led_model.checkpoint.hub import first_line

MAX_TENSORS = 20_000  # no checkpoint has more, LED-large has 700
_MAX_HEADER = 4 << 20  # a file lists its tensors in no more bytes, LED-large in 100,000
_END, _END_64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def read_file(path: Path) -> Any:
    """Returns what a ``.safetensors`` or ``.bin`` file holds, mapped into memory where that is possible.

    Raises:
        ValueError: when it cannot be read.
    """
    with _reading(path):
        if path.suffix == ".safetensors":
            _names_in_header(path)
            return load_file(path)
        is_archive = _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is said by an error here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def write_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a ``.safetensors`` file of contiguous tensors, which everyone may read who may read other new files.

    Raises:
        OSError: when it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # of its own, for a full disk, too
        raise OSError(
            f"{path} cannot be written ({first_line(error)}); free space, or name another place."
        ) from None
    path.chmod(mode)  # safetensors leaves it to its owner alone


def names_in_header(path: Path) -> list[str]:
    """Returns the names of the tensors in a ``.safetensors`` file.

    Raises: as for :func:`read_file`.
    """
    with _reading(path):
        return _names_in_header(path)


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Turns what reading a damaged file raises into a ValueError of one sentence."""
    try:
        yield
    except pickle.UnpicklingError:  # torch's text advises to trust the file
        raise ValueError(
            f"{path} holds no readable weights: it is damaged, or a pickle of other things than tensors; fetch it "
            "again, or save the model's state_dict as safetensors."
        ) from None
    except Exception as error:  # on damaged files, both libraries and pickle raise errors of any type
        raise ValueError(f"{path} holds no readable weights ({first_line(error)}); fetch it again.") from None


def _names_in_header(path: Path) -> list[str]:
    """Returns the names in a safetensors header, which is its length in 8 bytes and an object of the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"its header is {length:,} bytes long")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors, more than any LED")
    return [name for name in header if name != "__metadata__"]


def _check_archive(path: Path) -> bool:
    """Returns whether a file is a zip archive, as torch writes since 1.6, and checks that archive.

    Raises:
        ValueError: when its directory is damaged or far too large, or when an entry is compressed.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
        size = path.stat().st_size
        file.seek(max(size - 98, 0))
        last = file.read()
    # An archive ends in three records: the directory's of large archives (56 bytes), where that one is (20), and the
    # directory's of all archives (22).
    large, locator, end = last[:-42], last[-42:-22], last[-22:]
    if end[:4] != _END:
        raise ValueError("its directory is missing")
    entries, length = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if locator[:4] == _LOCATOR:
        if large[:4] != _END_64 or int.from_bytes(locator[8:16], "little") != size - 98:
            raise ValueError("its directory is damaged")
        entries, length = int.from_bytes(large[32:40], "little"), int.from_bytes(large[40:48], "little")
    if entries > MAX_TENSORS or length > _MAX_HEADER:
        raise ValueError(f"it has {entries:,} entries and a directory of {length:,} bytes")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("TorchScript")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError("an entry is compressed")
            if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_HEADER:
                raise ValueError(f"its list of tensors is {entry.file_size:,} bytes long")
    return True
