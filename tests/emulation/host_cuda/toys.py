"""Calls the kernels of ``toys.cu``."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from tests.emulation.host_cuda.build import build_toys


class ToyFailure(RuntimeError):
    """The launch's error."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_toys()))
    library.run_toy.restype = ctypes.c_char_p
    return library


def run_toy(
    name: str,
    given: np.ndarray,
    out: np.ndarray,
    *,
    option: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared_bytes: int = 0,
) -> np.ndarray:
    """Launches the kernel on a contiguous input and an output to be written -> the output."""
    error = _library().run_toy(
        name.encode(),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        ctypes.c_size_t(shared_bytes),
        np.ascontiguousarray(given).ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        option,
    )
    if error:
        raise ToyFailure(error.decode())
    return out
