"""Keeps encoded examples on disk, so that memory holds no more of them than a batch."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class ExampleStore(Dataset[dict[str, Tensor]]):
    """Keeps examples in a file without a name, which is gone with the process, however that ends.

    After :meth:`seal`, example ``i`` is ``store[i]``: int64 ``input_ids``, ``[seqlen]``, and ``labels``, ``[target]``.

    Args:
        directory: where the file is.
    """

    def __init__(self, directory: Path) -> None:
        # Where files without a name are not served it has this one for a moment, by which later runs remove it.
        self._file = tempfile.TemporaryFile(dir=directory, prefix=".led-")  # noqa: SIM115
        self._ends = array("q", [0])  # example i is the ids from the 2 i-th to the (2 i + 2)-th of them
        self._digest = hashlib.sha256()
        self._ids = np.empty(0, np.int32)

    def append(self, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Adds an example of int32 ``[seqlen]`` and ``[target]``."""
        for row in (input_ids, labels):
            data = row.astype(np.int32).tobytes()
            self._digest.update(len(row).to_bytes(8, "little") + data)
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(row))

    def seal(self) -> None:
        """Makes what was appended readable."""
        self._file.flush()
        if self._ends[-1]:
            self._ids = np.memmap(self._file, np.int32, "r", shape=(self._ends[-1],))

    @property
    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits that depend on all examples and their order."""
        return self._digest.hexdigest()[:16]

    @property
    def lengths(self) -> np.ndarray:
        """Returns the lengths of sources and targets, int64 ``[examples, 2]``."""
        return np.diff(np.asarray(self._ends)).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ends) // 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, middle, end = self._ends[2 * index : 2 * index + 3]
        return {"input_ids": self._row(begin, middle), "labels": self._row(middle, end)}

    def _row(self, begin: int, end: int) -> Tensor:
        return torch.from_numpy(self._ids[begin:end].astype(np.int64))


@dataclass
class Examples(Dataset[dict[str, Tensor]]):
    """Holds some of the examples of a store, those at ``indices``, int64 ``[examples]``."""

    store: ExampleStore
    indices: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Returns the lengths of sources and targets, int64 ``[examples, 2]``."""
        return self.store.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.store[int(self.indices[index])]
