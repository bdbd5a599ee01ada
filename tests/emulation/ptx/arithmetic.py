"""The table of opcodes that compute lane by lane: ``opcode -> (function, type of the result, types of the operands)``.

What is not in the table is not modelled: ``add.rz.f32`` raises, it does not round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .formats import TYPES, flush_subnormals


class Operation(NamedTuple):
    function: Callable[..., np.ndarray]
    result: str
    operands: tuple[str, ...]


OPERATIONS: dict[str, Operation] = {}

_U32 = np.uint32


def _define(opcode: str, function: Callable[..., np.ndarray], result: str, *operands: str) -> None:
    OPERATIONS[opcode] = Operation(function, result, operands)


def mad(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product is exact in fp64; the sum is rounded to fp64 before it is rounded to fp32."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def mul_wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def mul_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return (mul_wide(a, b) >> bits).astype(a.dtype)


def divide_towards_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))


def remainder_of_dividend_sign(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - divide_towards_zero(a, b) * b


def shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """numpy, as PTX, shifts everything out when the amount exceeds the width."""
    return a << amount.astype(a.dtype)


def shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return a >> np.minimum(amount, 8 * a.dtype.itemsize).astype(a.dtype)


def funnel_shift_left(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """The upper half of ``high:low << (amount mod 32)``."""
    return (_joined(low, high) << (amount & _U32(31)).astype(np.uint64) >> np.uint64(32)).astype(_U32)


def funnel_shift_right(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """The lower half of ``high:low >> (amount mod 32)``."""
    return (_joined(low, high) >> (amount & _U32(31)).astype(np.uint64)).astype(_U32)


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


def extract_bits(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``bfe``: ``length`` bits from ``position``; a signed field brings its top bit as the sign."""
    wide = a.astype(np.int64)
    position, length = position.astype(np.int64) & 0xFF, length.astype(np.int64) & 0xFF
    field = (wide >> position) & ((1 << np.minimum(length, 32)) - 1)
    if a.dtype.kind == "i":
        sign = 1 << np.maximum(length - 1, 0)
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


def insert_bits(field: np.ndarray, a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``bfi``: ``a`` with ``length`` bits of ``field`` at ``position``."""
    position, length = (
        position.astype(np.uint64) & np.uint64(0xFF),
        length.astype(np.uint64) & np.uint64(0xFF),
    )
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    return ((field.astype(np.uint64) << position & mask) | (a.astype(np.uint64) & ~mask)).astype(a.dtype)


def logic_of_three(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``lop3``: bit ``4 a + 2 b + c`` of the table, for each bit position."""
    result = np.zeros_like(a)
    for row in range(8):
        if table[0] >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt``: each nibble of the selector picks one of the eight bytes of ``b:a``; its top bit, the byte's sign."""
    eight = _joined(a, b)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> _U32(4 * i)) & _U32(15)
        byte = (eight >> ((nibble & _U32(7)) * _U32(8)).astype(np.uint64)).astype(_U32) & _U32(0xFF)
        sign = np.where(byte & _U32(0x80), _U32(0xFF), _U32(0))
        result = result | (np.where(nibble & _U32(8), sign, byte) << _U32(8 * i))
    return result


def population_count(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(_U32)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    return (32 - np.ceil(np.log2(a.astype(np.float64) + 1))).astype(_U32)


def maximum_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The other one where one is NaN."""
    return np.fmax(a, b)


def minimum_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmin(a, b)


def select(a: np.ndarray, b: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.where(condition, a, b)


def reciprocal(a: np.ndarray) -> np.ndarray:
    return np.float32(1) / a


def reciprocal_root(a: np.ndarray) -> np.ndarray:
    return np.float32(1) / np.sqrt(a)


def flushed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """``.ftz``"""
    return lambda *operands: flush_subnormals(function(*map(flush_subnormals, operands)))


def unordered(compare: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """True where one is NaN (``ltu``, ``neu`` ...)."""
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def ordered_not_equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a < b) | (a > b)


def both_numbers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ~(np.isnan(a) | np.isnan(b))


def either_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def _define_integers() -> None:
    for bits in (16, 32, 64):
        signed, unsigned, raw, wide = f"s{bits}", f"u{bits}", f"b{bits}", 2 * bits
        for t in (signed, unsigned):
            _define(f"add.{t}", np.add, t, t, t)
            _define(f"sub.{t}", np.subtract, t, t, t)
            _define(f"mul.lo.{t}", np.multiply, t, t, t)
            _define(f"mad.lo.{t}", mad, t, t, t, t)
            _define(f"min.{t}", np.minimum, t, t, t)
            _define(f"max.{t}", np.maximum, t, t, t)
            _define(f"shr.{t}", shift_right, t, t, "u32")
            if bits < 64:
                widened = f"{t[0]}{wide}"
                _define(f"mul.wide.{t}", mul_wide, widened, t, t)
                _define(f"mad.wide.{t}", lambda a, b, c: mul_wide(a, b) + c, widened, t, t, widened)
                _define(f"mul.hi.{t}", mul_high, t, t, t)
                _define(f"mad.hi.{t}", lambda a, b, c: mul_high(a, b) + c, t, t, t, t)
        _define(f"div.{signed}", divide_towards_zero, signed, signed, signed)
        _define(f"rem.{signed}", remainder_of_dividend_sign, signed, signed, signed)
        _define(f"div.{unsigned}", np.floor_divide, unsigned, unsigned, unsigned)
        _define(f"rem.{unsigned}", np.remainder, unsigned, unsigned, unsigned)
        _define(f"neg.{signed}", np.negative, signed, signed)
        _define(f"abs.{signed}", np.abs, signed, signed)
        _define(f"shl.{raw}", shift_left, raw, raw, "u32")
        _define(f"selp.{raw}", select, raw, raw, raw, "pred")
        for t in (signed, unsigned):
            _define(f"selp.{t}", select, t, t, t, "pred")
    for t in ("pred", "b16", "b32", "b64"):
        _define(f"and.{t}", np.bitwise_and, t, t, t)
        _define(f"or.{t}", np.bitwise_or, t, t, t)
        _define(f"xor.{t}", np.bitwise_xor, t, t, t)
        _define(f"not.{t}", np.invert, t, t)
    for t in ("u32", "s32"):
        _define(f"bfe.{t}", extract_bits, t, t, "u32", "u32")
    _define("bfi.b32", insert_bits, "b32", "b32", "b32", "u32", "u32")
    _define("lop3.b32", logic_of_three, "b32", "b32", "b32", "b32", "u32")
    _define("prmt.b32", permute_bytes, "b32", "b32", "b32", "b32")
    _define("shf.l.wrap.b32", funnel_shift_left, "b32", "b32", "b32", "u32")
    _define("shf.r.wrap.b32", funnel_shift_right, "b32", "b32", "b32", "u32")
    _define("popc.b32", population_count, "u32", "b32")
    _define("clz.b32", leading_zeros, "u32", "b32")


def _define_floats() -> None:
    binary = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for t in ("f32", "f64"):
        for rounding in ("", ".rn"):
            for name, function in binary.items():
                _define(f"{name}{rounding}.{t}", function, t, t, t)
        _define(f"selp.{t}", select, t, t, t, "pred")
        _define(f"neg.{t}", np.negative, t, t)
        _define(f"abs.{t}", np.abs, t, t)
        _define(f"min.{t}", minimum_number, t, t, t)
        _define(f"max.{t}", maximum_number, t, t, t)
    _define("fma.rn.f32", fma, "f32", "f32", "f32", "f32")
    _define("min.NaN.f32", np.minimum, "f32", "f32", "f32")
    _define("max.NaN.f32", np.maximum, "f32", "f32", "f32")
    for variant in ("div.full", "div.rn", "div.approx"):
        _define(f"{variant}.f32", np.divide, "f32", "f32", "f32")
    for opcode, function in {
        "ex2.approx": np.exp2,
        "lg2.approx": np.log2,
        "rcp.approx": reciprocal,
        "rcp.rn": reciprocal,
        "sqrt.approx": np.sqrt,
        "sqrt.rn": np.sqrt,
        "rsqrt.approx": reciprocal_root,
        "tanh.approx": np.tanh,
        "sin.approx": np.sin,
        "cos.approx": np.cos,
    }.items():
        _define(f"{opcode}.f32", function, "f32", "f32")
    for opcode, (function, result, operands) in list(OPERATIONS.items()):
        if result == "f32" and not opcode.startswith("selp"):
            _define(opcode.removesuffix("f32") + "ftz.f32", flushed(function), result, *operands)
    for half in ("f16", "bf16", "f16x2", "bf16x2"):
        for rounding in ("", ".rn"):
            for name, function in binary.items():
                _define(f"{name}{rounding}.{half}", function, half, half, half)
        _define(f"fma.rn.{half}", fma, half, half, half, half)
        _define(f"neg.{half}", np.negative, half, half)
        _define(f"abs.{half}", np.abs, half, half)
        _define(f"min.{half}", minimum_number, half, half, half)
        _define(f"max.{half}", maximum_number, half, half, half)


def comparison(name: str, type_name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """The function of ``setp.<name>...<type>``; None where there is none."""
    plain = {
        "eq": np.equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    if TYPES[type_name].is_float:
        with_nan = {f"{key}u": unordered(function) for key, function in plain.items()}
        only_float = {"ne": ordered_not_equal, "neu": np.not_equal, "num": both_numbers, "nan": either_nan}
        return (plain | with_nan | only_float).get(name)
    unsigned = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    return (plain | {"ne": np.not_equal} | unsigned).get(name)


_define_integers()
_define_floats()
