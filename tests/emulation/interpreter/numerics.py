"""bf16 and tf32 for Triton's interpreter, which computes on the bit patterns of bf16 as on integers (triton #11584).

Numbers are kept as the interpreter keeps them: bf16 as uint16. As on a GPU, arithmetic is done in fp32 and rounded
once, matrix products multiply their operands exactly, and fp32 operands of a tf32 product are rounded to 10 bits of
mantissa first. Overflow of a signed 32-bit integer is an error. Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_OVERFLOWING = (np.add, np.subtract, np.multiply)
_TF32 = ir.INPUT_PRECISION.TF32
_cast_impl = InterpreterBuilder.cast_impl
_binary_op = InterpreterBuilder.binary_op
_unary_op = InterpreterBuilder.unary_op
_ternary_op = InterpreterBuilder.ternary_op
_create_fma = InterpreterBuilder.create_fma
_create_dot = InterpreterBuilder.create_dot
_reduce = ReduceOps.apply_impl


def float32_of(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_of(x: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of fp32 values rounded to the nearest bf16, ties to even; one NaN for all."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 values rounded to 10 bits of mantissa, ties away from zero, as ``cvt.rna.tf32`` does; inf and NaN stay."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


@contextmanager
def exact_numerics() -> Iterator[None]:
    """Within the context the interpreter computes in bf16 and tf32 as a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "get_bf16", _constant, raising=False)  # 3.6 has none
        patch.setattr(InterpreterBuilder, "cast_impl", _cast)
        patch.setattr(InterpreterBuilder, "unary_op", _unary)
        patch.setattr(InterpreterBuilder, "binary_op", _binary)
        patch.setattr(InterpreterBuilder, "ternary_op", _ternary)
        patch.setattr(InterpreterBuilder, "create_fma", _fma)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(ReduceOps, "apply_impl", _reduction)
        yield


def _is_bfloat16(handle: TensorHandle) -> bool:
    """Comparisons keep the dtype of what they compared, but hold bools."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle: TensorHandle) -> np.ndarray:
    return float32_of(handle.data) if _is_bfloat16(handle) else handle.data


def _handle(values: np.ndarray) -> TensorHandle:
    """The bf16 handle of fp32 values; comparisons stay bools."""
    if values.dtype == np.bool_:
        return TensorHandle(values, tl.int1)
    return TensorHandle(bfloat16_of(values), tl.bfloat16)


def _constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    return _handle(np.array([value], np.float32))


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        return src if _is_bfloat16(src) else _handle(src.data.astype(np.float32))
    if not _is_bfloat16(src):
        return _cast_impl(self, src, dst_type)
    widened = TensorHandle(float32_of(src.data), tl.float32)
    return widened if dst_type.scalar == tl.float32 else _cast_impl(self, widened, dst_type)


def _unary(self: InterpreterBuilder, arg: TensorHandle, op: Callable) -> TensorHandle:
    return _handle(op(_values(arg))) if _is_bfloat16(arg) else _unary_op(self, arg, op)


def _binary(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
    if _is_bfloat16(lhs) and _is_bfloat16(rhs):
        return _handle(op(_values(lhs), _values(rhs)))
    if op in _OVERFLOWING and lhs.data.dtype == rhs.data.dtype == np.int32:
        wide = op(lhs.data, rhs.data, dtype=np.int64)
        narrow = wide.astype(np.int32)
        if not np.array_equal(wide, narrow):
            raise OverflowError(f"{op.__name__} of int32 gives {wide.min()} to {wide.max()}")
        return TensorHandle(narrow, lhs.dtype.scalar)
    return _binary_op(self, lhs, rhs, op)


def _ternary(
    self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable
) -> TensorHandle:
    if op is not np.where and _is_bfloat16(other):
        return _handle(op(_values(lhs), _values(rhs), _values(other)))
    return _ternary_op(self, lhs, rhs, other, op)


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if _is_bfloat16(z):  # a product of two bf16 is exact in fp32
        return _handle(_values(x) * _values(y) + _values(z))
    return _create_fma(self, x, y, z)


def _dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    input_precision: ir.INPUT_PRECISION,
    max_num_imprecise_acc: int,
) -> TensorHandle:
    if a.dtype.scalar not in (tl.bfloat16, tl.float16, tl.float32) or d.dtype.scalar != tl.float32:
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    left, right = (_values(x).astype(np.float32, copy=False) for x in (a, b))
    if a.dtype.scalar == tl.float32 and input_precision == _TF32:
        left, right = round_to_tf32(left), round_to_tf32(right)
    return TensorHandle(np.matmul(left, right) + d.data, tl.float32)


def _reduction(self: ReduceOps, inputs: tuple[tl.tensor, ...]) -> object:
    if any(_is_bfloat16(x.handle) for x in inputs):  # the order of rounding is the compiler's
        raise NotImplementedError("a reduction in bf16; cast to fp32 before it")
    return _reduce(self, inputs)
