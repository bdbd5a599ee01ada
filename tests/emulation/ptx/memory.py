"""Global memory: one segment for each tensor argument, far apart from each other. The parameter space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .faults import MemoryFault, RaceFault

_SEGMENT_BITS = 40
_MIDDLE = 1 << (_SEGMENT_BITS - 1)  # offsets below zero stay inside the segment, to be reported as such
_PAGE = 4096


@dataclass
class Segment:
    """One argument's storage.

    Attributes:
        name: the argument's, for messages.
        data: the storage's bytes, shared with the tensor.
        origin: address of its first byte, which keeps the alignment of the real one.
        covered: which bytes the argument's view holds; None for all.
        writer: which CTA of this launch wrote each byte last, -1 for none; None before the first store.
    """

    name: str
    data: np.ndarray
    origin: int
    covered: np.ndarray | None = None
    writer: np.ndarray | None = None


class GlobalMemory:
    """Addresses carry the segment's number in their upper bits, so that a stray one hits no other tensor."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def add_tensor(self, name: str, tensor: Tensor) -> int:
        """Makes a CPU tensor visible to the kernel, the elements of its view alone -> the address of the first."""
        storage = tensor.detach().untyped_storage()
        assert storage.data_ptr() % 16 == 0, "torch aligns its storages"
        covered = torch.zeros(storage.nbytes() // tensor.itemsize, dtype=torch.bool)
        covered.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        number = len(self._segments) + 1
        origin = (number << _SEGMENT_BITS) + _MIDDLE + storage.data_ptr() % _PAGE
        self._segments[number] = Segment(
            name,
            torch.empty(0, dtype=torch.uint8).set_(storage).numpy(),
            origin,
            None if covered.all() else np.repeat(covered.numpy(), tensor.itemsize),
        )
        return origin + tensor.storage_offset() * tensor.itemsize

    def begin_launch(self) -> None:
        """Makes what was stored so far there for every CTA."""
        for segment in self._segments.values():
            segment.writer = None

    def load(self, address: np.ndarray, nbytes: int, cta: np.ndarray) -> np.ndarray:
        """-> uint8 [lanes, nbytes]

        Args:
            address: uint64 [lanes].
            cta: [lanes], which CTA of the launch each lane belongs to.
        """
        rows = np.empty((len(address), nbytes), np.uint8)
        for segment, lanes, where in self._locate(address, nbytes, "load"):
            if segment.writer is not None:
                writer = _rows(segment.writer, nbytes)[where]
                if ((writer >= 0) & (writer != cta[lanes][:, None])).any():
                    raise RaceFault(f"load of what another CTA of this launch stored in {segment.name}")
            rows[lanes] = np.take(_rows(segment.data, nbytes), where, axis=0)
        return rows

    def store(self, address: np.ndarray, rows: np.ndarray, cta: np.ndarray) -> None:
        """``rows``: uint8 [lanes, nbytes]; seen by all at once."""
        nbytes = rows.shape[1]
        for segment, lanes, where in self._locate(address, nbytes, "store"):
            if segment.writer is None:
                segment.writer = np.full(len(segment.data), -1, np.int32)
            data, writer = _rows(segment.data, nbytes), _rows(segment.writer, nbytes)
            values, owner = rows[lanes], cta[lanes][:, None]
            before = writer[where]
            foreign = ((before >= 0) & (before != owner)).any(axis=1)
            if foreign.any() and (data[where[foreign]] != values[foreign]).any():
                raise RaceFault(f"two CTAs store different values in the same place of {segment.name}")
            data[where] = values
            if (data[where] != values).any():
                raise RaceFault(
                    f"two lanes of one instruction store different values in the same place of {segment.name}"
                )
            writer[where] = owner

    def _locate(
        self, address: np.ndarray, nbytes: int, what: str
    ) -> Iterator[tuple[Segment, slice | np.ndarray, np.ndarray]]:
        """-> (segment, lanes, index in units of nbytes) for each segment that is addressed"""
        if not len(address):
            return
        numbers = address >> np.uint64(_SEGMENT_BITS)
        if (numbers == numbers[0]).all():
            groups = [(int(numbers[0]), slice(None))]
        else:
            groups = [(int(n), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]
        for number, lanes in groups:
            segment = self._segments.get(number)
            if segment is None:
                raise MemoryFault(
                    f"{what} of {nbytes} bytes at {int(address[lanes][0]):#x}, which is in no tensor"
                )
            if (address[lanes] % np.uint64(nbytes)).any():
                raise MemoryFault(f"misaligned {what} of {nbytes} bytes in {segment.name}")
            offset = address[lanes].astype(np.int64) - segment.origin
            outside = (offset < 0) | (offset + nbytes > len(segment.data))
            if outside.any():
                raise MemoryFault(
                    f"{what} of {nbytes} bytes at byte {offset[outside][0]} of {segment.name}, "
                    f"which holds {len(segment.data)}"
                )
            where = offset // nbytes
            if segment.covered is not None and not _rows(segment.covered, nbytes)[where].all():
                raise MemoryFault(f"{what} of {nbytes} bytes outside of the view {segment.name}")
            yield segment, lanes, where


def load_parameters(space: np.ndarray, address: np.ndarray, nbytes: int) -> np.ndarray:
    """-> uint8 [lanes, nbytes]

    Args:
        space: uint8, the bytes of all parameters.
        address: int64 [lanes].
    """
    if (address % nbytes).any():
        raise MemoryFault(f"misaligned load of {nbytes} bytes in the parameters")
    if ((address < 0) | (address + nbytes > len(space))).any():
        raise MemoryFault(f"load of {nbytes} bytes outside of the parameters, which hold {len(space)}")
    return space[address[:, None] + np.arange(nbytes)]


def _rows(array: np.ndarray, nbytes: int) -> np.ndarray:
    """Views the memory as [rows, nbytes], without a rest that no aligned access reaches."""
    return array[: len(array) // nbytes * nbytes].reshape(-1, nbytes)
