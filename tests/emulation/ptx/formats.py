"""PTX types as numpy arrays.

A register is an unsigned array of its width (a predicate a bool array), one element a lane; its type belongs to the
instruction. ``decode`` gives the values an instruction computes with, ``encode`` the bits it writes. Half types are
computed in fp32 and rounded when written; packed pairs are ``[lanes, 2]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNSIGNED = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
STORAGE = {f"b{bits}": dtype for bits, dtype in UNSIGNED.items()} | {"pred": np.dtype(bool)}


@dataclass(frozen=True)
class PtxType:
    """``decode``: storage array -> values; ``encode``: values -> storage array."""

    name: str
    storage: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]

    @property
    def is_float(self) -> bool:
        return "f" in self.name

    @property
    def is_signed(self) -> bool:
        return self.name[0] == "s"


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; every NaN becomes 0x7fff."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fp16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def fp32_to_fp16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def fp32_to_tf32(values: np.ndarray, *, ties_away: bool) -> np.ndarray:
    """10 bits of mantissa, to nearest, ties to even or away from zero -> fp32 bits."""
    bits = values.view(np.uint32)
    half = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isnan(values), bits, (bits + half) & np.uint32(0xFFFFE000))


def tf32_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Returns what the tensor core reads: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def flush_subnormals(values: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal fp32 become zeros of their sign."""
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(values) < tiny, np.copysign(np.float32(0), values), values)


def _viewed(name: str, dtype: type) -> PtxType:
    storage = UNSIGNED[8 * np.dtype(dtype).itemsize]
    return PtxType(
        name, storage, lambda x: x.view(dtype), lambda x: x.astype(dtype, copy=False).view(storage)
    )


def _packed(name: str, half: PtxType) -> PtxType:
    """Two halves in 32 bits, the low one first."""
    return PtxType(
        name,
        UNSIGNED[32],
        lambda x: half.decode(np.ascontiguousarray(x).view(np.uint16)).reshape(-1, 2),
        lambda x: np.ascontiguousarray(half.encode(x)).view(np.uint32).reshape(-1),
    )


TYPES = {
    "pred": PtxType("pred", np.dtype(bool), lambda x: x, lambda x: x),
    "f16": PtxType("f16", UNSIGNED[16], fp16_to_fp32, fp32_to_fp16),
    "bf16": PtxType("bf16", UNSIGNED[16], bf16_to_fp32, fp32_to_bf16),
    "tf32": PtxType("tf32", UNSIGNED[32], tf32_to_fp32, lambda x: fp32_to_tf32(x, ties_away=True)),
    "f32": _viewed("f32", np.float32),
    "f64": _viewed("f64", np.float64),
}
TYPES |= {f"{half}x2": _packed(f"{half}x2", TYPES[half]) for half in ("f16", "bf16")}
for _bits in UNSIGNED:
    TYPES |= {f"{letter}{_bits}": _viewed(f"{letter}{_bits}", getattr(np, f"uint{_bits}")) for letter in "bu"}
    TYPES[f"s{_bits}"] = _viewed(f"s{_bits}", getattr(np, f"int{_bits}"))
