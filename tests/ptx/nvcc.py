"""The forward kernels of csrc/cuda as nvcc compiles them for sm_80, executed on CPU tensors.

:class:`InterpretedCuda` has the forward functions of a backend's module and takes the place of the ``cuda`` one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from led_kernels.mask import LongformerMask

from .machine import compiled, execute
from .memory import GlobalMemory

_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # led::DType
_PRODUCTS = {
    torch.float32: "FmaProductsI",
    torch.float16: "TensorCoreProductsINS0_4HalfE",
    torch.bfloat16: "TensorCoreProductsINS0_8BFloat16E",
}
_SPLIT_SIZE = 192  # three tiles: the first stage is filled again


class _RowsRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "row_stride", "head_stride")]


class _LseRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "head_stride")]


class _MaskRef(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("seq_start", "seq_len", "token_kind", "padding_before")),
        *((name, ctypes.c_int64) for name in ("global_index", "num_globals", "batch_stride", "max_globals")),
        ("packed", ctypes.c_bool),
    ]


class _AttentionParams(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "max_seqlen", "heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("window_left", "window_right")),
        *((name, ctypes.c_double) for name in ("softmax_scale", "dropout_p")),
        ("dropout_seed", ctypes.c_uint64),
        ("num_threads", ctypes.c_int),
        ("mask", _MaskRef),
        *((name, _RowsRef) for name in ("q", "k", "v", "out")),
        ("lse", _LseRef),
        *((name, _RowsRef) for name in ("d_out", "dq", "dk", "dv")),
        ("d_lse", _LseRef),
        ("device", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("stream", "device_seed", "workspace")),
    ]


class _Arguments(ctypes.Structure):
    """``led::cuda::Arguments``"""

    _fields_ = [
        ("p", _AttentionParams),
        *((name, ctypes.c_float) for name in ("qk_scale", "softmax_scale", "keep_scale")),
        ("last_dropped", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("delta", "partials")),
        *((name, ctypes.c_int) for name in ("num_splits", "split_size")),
    ]


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template.

    Attributes:
        name: of the template.
        ptx: a module that holds it alone.
        rows: of its tiles, and ``columns``.
    """

    name: str
    ptx: str
    head_dim: int
    rows: int
    columns: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """A tile of rows; tiles of k and v, twice where copies are asynchronous."""
        tiles = 2 if dtype == torch.float32 else 4
        return dtype.itemsize * self.head_dim * (self.rows + tiles * self.columns)


def nvcc_path() -> str | None:
    """Of CUDA_HOME, else of PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


@functools.cache
def compile_ptx(source: str, head_dim: int) -> str:
    """``csrc/cuda/<source>.cu`` as a module with all of its kernels."""
    command = [
        nvcc_path(),
        "-ptx",
        "-arch=compute_80",
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-DLED_HEAD_DIM={head_dim}",
    ]
    command += [str(_SOURCES / f"{source}.cu"), "-o", "/dev/stdout"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def kernels(ptx: str, name: str, dtype: torch.dtype, *, may_drop: bool | None = None) -> list[Kernel]:
    """The instances of a template for a dtype, few rows first.

    Args:
        may_drop: of a template that has it as a parameter; those for fp32 have it on.
    """
    head, *entries = re.split(r"^(?=\.visible \.entry)", ptx, flags=re.MULTILINE)
    drops = "" if may_drop is None else f"Lb{int(may_drop or dtype == torch.float32)}E"
    pattern = rf"\d{name}INS0_\d+{_PRODUCTS[dtype]}((?:Li\d+E)+)(?:Lb0E)?EE{drops}EEv"
    found = []
    for entry in entries:
        if match := re.search(pattern, entry.partition("(")[0]):
            head_dim, rows_per_lane, columns, warps = map(int, re.findall(r"\d+", match[1]))
            found.append(Kernel(name, head + entry, head_dim, 8 * rows_per_lane * warps, columns))
    return sorted(found, key=lambda kernel: kernel.rows)


class InterpretedCuda:
    """Launches as csrc/cuda does.

    Args:
        edit_ptx: ``(kernel template, PTX) -> PTX``, for tests of the tests.

    Attributes:
        launched: the kernels, in order.
    """

    def __init__(self, edit_ptx: Callable[[str, str], str] | None = None) -> None:
        self.launched: list[Kernel] = []
        self._edit_ptx = edit_ptx

    def banded_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: LongformerMask,
        window_left: int,
        window_right: int,
        softmax_scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As ``led_kernels.backends.cuda.banded_forward``."""
        *lead, rows, heads, head_dim = q.shape
        lse = torch.full((*lead, heads, rows), float("nan"))
        call = _Call(q, k, v, lse, mask, softmax_scale, dropout_p, seed)
        call.arguments.p.window_left, call.arguments.p.window_right = window_left, window_right
        ptx = compile_ptx("banded_forward", head_dim)
        (kernel,) = kernels(ptx, "banded_forward_kernel", q.dtype, may_drop=seed is not None)
        self._launch(kernel, call, -(-mask.max_seqlen // kernel.rows), kernel.shared_bytes(q.dtype))
        return call.out, lse

    def global_forward(
        self,
        q_global: Tensor,
        k_global: Tensor,
        v_global: Tensor,
        mask: LongformerMask,
        softmax_scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As ``led_kernels.backends.cuda.global_forward``."""
        batch, slots, heads, head_dim = q_global.shape
        lse = torch.full((batch, heads, slots), float("nan"))
        call = _Call(q_global, k_global, v_global, lse, mask, softmax_scale, dropout_p, seed)
        splits = -(-mask.max_seqlen // _SPLIT_SIZE)
        partials = torch.full((batch, heads, splits, slots, head_dim + 2), float("nan"))
        call.arguments.partials = call.memory.add_tensor("partials", partials)
        call.arguments.num_splits, call.arguments.split_size = splits, _SPLIT_SIZE
        ptx = compile_ptx("global_forward", head_dim)
        instances = kernels(ptx, "global_forward_kernel", q_global.dtype)
        kernel = next((x for x in instances if slots <= x.rows), instances[-1])
        blocks = -(-slots // kernel.rows) * splits
        self._launch(kernel, call, blocks, kernel.shared_bytes(q_global.dtype))
        (merge,) = kernels(ptx, "global_merge_kernel", q_global.dtype)
        self._launch(merge, call, slots, 0)
        return call.out, lse

    def _launch(self, kernel: Kernel, call: _Call, blocks: int, shared_bytes: int) -> None:
        self.launched.append(kernel)
        call.memory.begin_launch()
        program = compiled(self._edit_ptx(kernel.name, kernel.ptx) if self._edit_ptx else kernel.ptx)
        ((name, place),) = program.entry.parameters.items()
        assert len(place) == ctypes.sizeof(_Arguments), "arguments.h has changed"
        bits = int.from_bytes(bytes(call.arguments), "little")
        grid = (blocks, call.arguments.p.heads, call.arguments.p.batch)
        execute(program, grid, {name: bits}, call.memory, shared_bytes)


class _Call:
    """Tensors in the interpreter's memory, ``out`` (filled with NaN) among them, and arguments that point there."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        mask: LongformerMask,
        softmax_scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.memory = GlobalMemory()
        self.out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        arguments = self.arguments = _Arguments(softmax_scale=softmax_scale, keep_scale=1, num_splits=1)
        arguments.qk_scale = softmax_scale * 1.4426950408889634
        p = arguments.p
        p.dtype, p.batch, p.max_seqlen = _DTYPES[q.dtype], mask.batch, mask.max_seqlen
        p.heads, p.head_dim = q.shape[-2:]
        for name, x in {"q": q, "k": k, "v": v, "out": self.out}.items():
            batch_stride = x.stride(0) if x.dim() == 4 else 0
            address = self.memory.add_tensor(name, x)
            setattr(p, name, _RowsRef(address, batch_stride, x.stride(-3), x.stride(-2)))
        p.lse = _LseRef(
            self.memory.add_tensor("lse", lse), lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2)
        )
        for name in (
            "seq_start", "seq_len", "token_kind", "padding_before", "global_index", "num_globals",
        ):  # fmt: skip
            setattr(p.mask, name, self.memory.add_tensor(name, getattr(mask, name)))
        p.mask.batch_stride = 0 if mask.is_packed else mask.max_seqlen
        p.mask.max_globals, p.mask.packed = mask.max_globals, mask.is_packed
        if seed is not None:
            p.device_seed = self.memory.add_tensor("seed", seed)
            arguments.last_dropped = round(dropout_p * 2**32) - 1
            arguments.keep_scale = 1 / (1 - dropout_p)
