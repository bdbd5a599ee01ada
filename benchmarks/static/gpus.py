"""The limits of the targets stand here.

The limits are those of the CUDA programming guide's table of compute capabilities and AMD's CDNA 3 ISA manual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """Describes one product of a compile target; memory in bytes.

    Attributes:
        shared_per_block: the most that one block may ask for.
        shared_reserved: what the system takes of each block's share of the multiprocessor, besides.
    """

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int
    blocks: int
    registers: int = 65536
    warp_size: int = WARP
    shared_reserved: int = 1024

    def resident_blocks(self, registers: int, shared: int, num_warps: int) -> int:
        """Counts the blocks that a multiprocessor holds at once.

        Args:
            registers: per thread; a warp takes them in units of 256.
            shared: bytes per block.
        """
        per_warp = math.ceil(registers * WARP / 256) * 256
        warps_by_registers = self.registers // per_warp // 4 * 4
        return min(
            self.blocks,
            self.warps // num_warps,
            warps_by_registers // num_warps,
            self.shared_per_multiprocessor // max(1, shared + self.shared_reserved),
        )


_KIB = 1024

GPUS = {
    "sm_75": Gpu("T4", 40, 64 * _KIB, 64 * _KIB, 32, 16, shared_reserved=0),
    "sm_80": Gpu("A100", 108, 163 * _KIB, 164 * _KIB, 64, 32),
    "sm_86": Gpu("A10", 72, 99 * _KIB, 100 * _KIB, 48, 16),
    "sm_89": Gpu("L40S", 142, 99 * _KIB, 100 * _KIB, 48, 24),
    "sm_90": Gpu("H100 SXM", 132, 227 * _KIB, 228 * _KIB, 64, 32),
    "sm_100": Gpu("B200", 148, 227 * _KIB, 228 * _KIB, 64, 32),
    "sm_120": Gpu("RTX PRO 6000", 188, 99 * _KIB, 100 * _KIB, 48, 24),
    "gfx942": Gpu("MI300X", 304, 64 * _KIB, 64 * _KIB, 32, 16, registers=131072, warp_size=64),
}
"""The GPU of each compile target."""

TARGETS = tuple(target for target in GPUS if target != "sm_75")
"""The targets of the Triton kernels."""
