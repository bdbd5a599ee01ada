"""The kernels of csrc/cuda, as nvcc compiles them for sm_80, executed on CPU tensors.

:class:`InterpretedCuda` has the two functions of a backend's module and takes the place of the ``cuda`` one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from led_kernels.call import AttentionCall

from .machine import compiled, execute
from .memory import GlobalMemory
from .nvcc import Kernel, compile_ptx, kernels

_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # led::DType
_SPLIT_SIZE = 192  # three tiles: the first stage is filled again


class _RowsRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "row_stride", "head_stride")]


class _LseRef(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("data", "batch_stride", "head_stride")]


class _MaskRef(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("seq_start", "seq_len", "token_kind", "padding_before")),
        *((name, ctypes.c_int64) for name in ("global_index", "num_globals", "position_offset")),
        *((name, ctypes.c_int64) for name in ("global_position", "batch_stride", "max_globals")),
        ("packed", ctypes.c_bool),
    ]


class _Window(ctypes.Structure):
    _fields_ = [("left", ctypes.c_int64), ("right", ctypes.c_int64)]


class _Dropout(ctypes.Structure):
    _fields_ = [("p", ctypes.c_double), ("seed", ctypes.c_uint64), ("device_seed", ctypes.c_int64)]


class _AttentionCall(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "max_seqlen", "heads", "head_dim")),
        *((name, _RowsRef) for name in ("q", "k", "v")),
        ("softmax_scale", ctypes.c_double),
        ("mask", _MaskRef),
        ("window", _Window),
        ("dropout", _Dropout),
    ]


class _AttentionResults(ctypes.Structure):
    _fields_ = [("out", _RowsRef), ("lse", _LseRef)]


class _AttentionGradients(ctypes.Structure):
    _fields_ = [
        ("d_out", _RowsRef),
        ("d_lse", _LseRef),
        *((name, _RowsRef) for name in ("dq", "dk", "dv")),
    ]


class _CudaExecution(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int), ("stream", ctypes.c_int64), ("workspace", ctypes.c_int64)]


class _Arguments(ctypes.Structure):
    """``led::cuda::Arguments``"""

    _fields_ = [
        ("call", _AttentionCall),
        ("results", _AttentionResults),
        ("grads", _AttentionGradients),
        ("execution", _CudaExecution),
        *((name, ctypes.c_float) for name in ("qk_scale", "softmax_scale", "keep_scale")),
        ("last_dropped", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("delta", "partials")),
        *((name, ctypes.c_int) for name in ("num_splits", "split_size")),
    ]


class InterpretedCuda:
    """Launches as csrc/cuda does; its functions are those of ``led_kernels.backends.cuda``.

    Args:
        edit_ptx: ``(kernel template, PTX) -> PTX``, for tests of the tests.

    Attributes:
        launched: the kernels, in order.
    """

    def __init__(self, edit_ptx: Callable[[str, str], str] | None = None) -> None:
        self.launched: list[Kernel] = []
        self._edit_ptx = edit_ptx

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = _undefined(call.q.shape, call.q.dtype), _undefined(call.lse_shape)
        if not call.is_global:
            launch = _Launch("banded_forward", call)
            launch.set_rows(out=out).set_statistics(lse=lse)
            self._launch_tiles(launch, "banded_forward_kernel", may_drop=call.seed is not None)
            return out, lse
        batch, slots, heads, head_dim = call.q.shape
        launch = _Launch("global_forward", call)
        launch.set_rows(out=out).set_statistics(lse=lse)
        launch.set_partials(batch, heads, launch.splits, slots, head_dim + 2)
        self._launch_splits(launch, "global_forward_kernel")
        self._launch_slots(launch, "global_merge_kernel")
        return out, lse

    def backward(
        self, call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        launch = _Launch("global_backward" if call.is_global else "banded_backward", call)
        grads = launch.set_backward(d_out, d_lse, out, lse)
        splits, globals_ = launch.splits, call.mask.max_globals
        if call.is_global:
            launch.set_partials(call.mask.batch, call.heads, splits, globals_, call.head_dim)
            self._launch_splits(launch, "global_dq_kernel")
            self._launch_slots(launch, "global_sum_splits_kernel")
            self._launch_tiles(launch, "global_dkdv_kernel")
            return grads
        launch.set_partials(2, call.mask.batch, call.heads, splits, globals_, call.head_dim)
        self._launch_tiles(launch, "banded_dq_kernel")
        self._launch_tiles(launch, "banded_dkdv_kernel")
        if globals_:
            self._launch_splits(launch, "banded_dkdv_globals_kernel")
            self._launch_slots(launch, "banded_sum_splits_kernel")
        return grads

    def _launch_tiles(self, launch: _Launch, name: str, may_drop: bool | None = None) -> None:
        """Launches a block for each tile of the sequence's rows."""
        (kernel,) = kernels(launch.ptx, name, launch.dtype, may_drop=may_drop)
        blocks = -(-launch.arguments.call.max_seqlen // kernel.rows)
        self._launch(kernel, launch, blocks, launch.shared_bytes(kernel))

    def _launch_splits(self, launch: _Launch, name: str) -> None:
        """Launches a block for each tile of global tokens and split; the smallest instance that holds them all."""
        instances, slots = kernels(launch.ptx, name, launch.dtype), launch.arguments.call.mask.max_globals
        kernel = next((x for x in instances if slots <= x.rows), instances[-1])
        blocks = -(-slots // kernel.rows) * launch.splits
        self._launch(kernel, launch, blocks, launch.shared_bytes(kernel))

    def _launch_slots(self, launch: _Launch, name: str) -> None:
        """Launches a block for each global token."""
        (kernel,) = kernels(launch.ptx, name, launch.dtype)
        self._launch(kernel, launch, launch.arguments.call.mask.max_globals, 0)

    def _launch(self, kernel: Kernel, launch: _Launch, blocks: int, shared_bytes: int) -> None:
        self.launched.append(kernel)
        launch.memory.begin_launch()
        program = compiled(self._edit_ptx(kernel.name, kernel.ptx) if self._edit_ptx else kernel.ptx)
        ((name, place),) = program.entry.parameters.items()
        assert len(place) == ctypes.sizeof(_Arguments), "arguments.h has changed"
        bits = int.from_bytes(bytes(launch.arguments), "little")
        grid = (blocks, launch.arguments.call.heads, launch.arguments.call.batch)
        execute(program, grid, {name: bits}, launch.memory, shared_bytes)


class _Launch:
    """Holds a call's tensors in the interpreter's memory, and arguments that point there.

    Args:
        source: of its kernels, in csrc/cuda.
    """

    def __init__(self, source: str, call: AttentionCall) -> None:
        q, mask = call.q, call.mask
        self.memory = GlobalMemory()
        self.ptx = compile_ptx(source, call.head_dim)
        self.dtype = q.dtype
        self.splits = -(-mask.max_seqlen // _SPLIT_SIZE)
        self._row_operands = 2 if source.endswith("backward") else 1
        self._qkv = q, call.k, call.v
        arguments = self.arguments = _Arguments(softmax_scale=call.softmax_scale, keep_scale=1)
        arguments.qk_scale = call.softmax_scale * 1.4426950408889634
        arguments.num_splits, arguments.split_size = self.splits, _SPLIT_SIZE
        struct = arguments.call
        struct.dtype, struct.batch, struct.max_seqlen = _DTYPES[q.dtype], mask.batch, mask.max_seqlen
        struct.heads, struct.head_dim = q.shape[-2:]
        if call.window is not None:
            struct.window = _Window(*call.window)
        self.set_rows(q=q, k=call.k, v=call.v)
        for name, x in mask.tensors()._asdict().items():
            setattr(struct.mask, name, self.memory.add_tensor(name, x))
        struct.mask.batch_stride = 0 if mask.is_packed else mask.max_seqlen
        struct.mask.max_globals, struct.mask.packed = mask.max_globals, mask.is_packed
        if call.seed is not None:
            struct.dropout.device_seed = self.memory.add_tensor("seed", call.seed)
            arguments.last_dropped = round(call.dropout_p * 2**32) - 1
            arguments.keep_scale = 1 / (1 - call.dropout_p)

    def set_rows(self, **tensors: Tensor) -> _Launch:
        """``[batch, rows, heads, head_dim]`` or ``[rows, heads, head_dim]``"""
        for name, x in tensors.items():
            address, batch_stride = self.memory.add_tensor(name, x), x.stride(0) if x.dim() == 4 else 0
            setattr(self._group(name), name, _RowsRef(address, batch_stride, x.stride(-3), x.stride(-2)))
        return self

    def set_statistics(self, **tensors: Tensor) -> _Launch:
        """``[batch, heads, rows]`` or ``[heads, rows]``"""
        for name, x in tensors.items():
            address, batch_stride = self.memory.add_tensor(name, x), x.stride(0) if x.dim() == 3 else 0
            setattr(self._group(name), name, _LseRef(address, batch_stride, x.stride(-2)))
        return self

    def _group(self, name: str) -> ctypes.Structure:
        """The arguments' struct that holds the tensor of that name."""
        groups = (self.arguments.call, self.arguments.results, self.arguments.grads)
        return next(group for group in groups if hasattr(group, name))

    def set_backward(
        self, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """-> dq, dk, dv, to be written"""
        grads = tuple(_undefined(x.shape, x.dtype) for x in self._qkv)
        self.set_rows(out=out, d_out=d_out.contiguous(), **dict(zip(("dq", "dk", "dv"), grads, strict=True)))
        self.set_statistics(lse=lse.contiguous())
        if d_lse is not None:
            self.set_statistics(d_lse=d_lse.contiguous())
        self.arguments.delta = self.memory.add_tensor("delta", _undefined(lse.shape))
        return grads

    def set_partials(self, *shape: int) -> None:
        self.arguments.partials = self.memory.add_tensor("partials", _undefined(shape))

    def shared_bytes(self, kernel: Kernel) -> int:
        """Tiles of rows; tiles of two operands' columns, twice where copies are asynchronous."""
        columns = (2 if self.dtype == torch.float32 else 4) * kernel.columns
        return self.dtype.itemsize * kernel.head_dim * (self._row_operands * kernel.rows + columns)


def _undefined(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)
