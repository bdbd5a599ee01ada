"""Predicted share of a loop's time in which the tensor core works.

The model: one quarter of a multiprocessor executes the loop body; each pipe is busy for instructions x 32 lanes / rate
cycles, one instruction is issued per cycle, and with enough warps all pipes overlap perfectly. The share is the tensor
core's cycles for products that are needed over the busiest pipe's: an upper bound that knows nothing of latencies,
barriers or memory.
"""

from __future__ import annotations

from benchmarks.static.gpus import WARP, Rates
from benchmarks.static.sass import HMMA_MACS, Loop

_ALU = frozenset(
    (
        "ISETP", "FSETP", "ISET", "FSET", "FSEL", "SEL", "PLOP3", "P2R", "R2P",
        "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "IADD3", "IADD", "VIADD", "IABS",
        "LOP3", "LOP", "SHF", "SHL", "SHR", "LEA", "PRMT", "SGXT", "BMSK", "MOV", "F2FP", "I2FP", "FCHK",
    )
)  # fmt: skip
_FP32 = frozenset(("FADD", "FMUL", "FFMA", "FSWZADD", "HADD2", "HMUL2", "HFMA2"))
_PACKED_FP32 = frozenset(["FADD2", "FMUL2", "FFMA2"])
_SPECIAL = frozenset(["MUFU", "F2F", "F2I", "I2F", "FRND", "FLO", "POPC", "BREV"])


def pipe_cycles(loop: Loop, rates: Rates) -> dict[str, float]:
    """Cycles for which one warp's iteration keeps each pipe of its quarter busy."""
    count = loop.opcodes

    def total(names: frozenset[str]) -> int:
        return sum(count[name] for name in names)

    return {
        "tensor": loop.tensor_macs / rates.tensor_macs,
        "special": total(_SPECIAL) * WARP / rates.special,
        "alu": total(_ALU) * WARP / rates.alu,
        "fma": (total(_FP32) + 2 * total(_PACKED_FP32)) * WARP / rates.fp32
        + count["IMAD"] * WARP / rates.imad,
        "issue": loop.size,
    }


def tensor_share(loop: Loop, hmmas: float, rates: Rates) -> float:
    """1 where nothing takes longer than the ``hmmas`` that the loop's tiles need (:meth:`Loop.hmmas`)."""
    return hmmas * HMMA_MACS / rates.tensor_macs / max(pipe_cycles(loop, rates).values())
