"""Tile sizes are chosen here by kernel, target, element size and head_dim.

No GPU has timed them. Each row of the table was chosen from what its compilation shows
(``benchmarks/results/static_gpu.csv``), and its reason says which of the figures decided. ``python -m benchmarks.tune``
ranks candidates on a real GPU and prints a new table.

With two stages Triton keeps one buffer of each tile, so that copies start at an iteration's end and are waited for at
the next one's start; three stages give two buffers. That costs the forward on sm_80 a few instructions and hides the
latency of the copies, which one resident block cannot.

``LED_KERNELS_TRITON_CONFIG`` overrides the table: ``64x64x4x2`` (BLOCK_M x BLOCK_N x warps x stages) for every kernel,
or ``banded_forward=128x64x8x2,banded_dq=64x64x4x2`` for some.
"""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple

import torch
import triton


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """Says what ``config`` serves: elements up to ``bits``, head_dims up to ``head_dim``, dropout if ``dropout``."""

    targets: tuple[str, ...]
    bits: int
    head_dim: int
    dropout: bool
    config: TileConfig
    reason: str


KERNELS = (
    "banded_forward",
    "banded_dq",
    "banded_dkdv",
    "banded_dkdv_globals",
    "global_forward",
    "global_forward_many",  # more global tokens than a tile of 16 queries holds
    "global_dq",
    "global_dq_many",
    "global_dkdv_many",
)
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_ALL = TARGETS
_WGMMA = ("sm_90", "sm_100")  # products of whole warp groups, 228 KB of shared memory
_SM_80, _SM_90, _SM_80_100 = ("sm_80",), ("sm_90",), ("sm_80", "sm_100")
_CONSUMER = ("sm_86", "sm_89", "sm_120")  # 100 KB of shared memory
_CDNA = ("gfx942",)  # 64 KB of shared memory
_OVERRIDE = re.compile(r"(?:(\w+)=)?(\d+)x(\d+)x(\d+)x(\d+)")


def choose(kernel: str, dtype: torch.dtype, head_dim: int, dropout_p: float = 0.0) -> TileConfig:
    """Returns the configuration of one of ``KERNELS`` on the current device.

    Raises:
        ValueError: ``LED_KERNELS_TRITON_CONFIG`` cannot be read.
    """
    override = os.environ.get("LED_KERNELS_TRITON_CONFIG")
    return _choose(kernel, dtype.itemsize * 8, head_dim, dropout_p > 0, current_target(), override)


def loads_by_descriptor() -> bool:
    """Tells whether interior tiles come by tensor descriptors: ``LED_KERNELS_TRITON_TMA=1``, on sm_90 and later."""
    if os.environ.get("LED_KERNELS_TRITON_TMA") != "1":
        return False
    return _is_interpreted() or current_target() in ("sm_90", "sm_100", "sm_120")


def current_target() -> str:
    """Returns the member of ``TARGETS`` whose configurations serve the current device."""
    if _is_interpreted():
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    return _nearest(target.backend, target.arch)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _nearest(backend: str, arch: int | str) -> str:
    """Returns the newest of ``TARGETS`` that is not newer than the device; ``sm_80`` for older ones."""
    if backend == "hip":
        return "gfx942"
    served = [target for target in TARGETS if target.startswith("sm_") and int(target[3:]) <= int(arch)]
    return served[-1] if served else "sm_80"


@functools.cache
def _choose(
    kernel: str, bits: int, head_dim: int, dropout: bool, target: str, override: str | None
) -> TileConfig:
    if override:
        named = _parse(override)
        if kernel in named or "" in named:
            return named.get(kernel) or named[""]
    return next(
        row.config
        for row in TABLE[kernel]
        if target in row.targets and bits <= row.bits and head_dim <= row.head_dim and dropout <= row.dropout
    )


# fmt: off
TABLE: dict[str, tuple[Row, ...]] = {
    "banded_forward": (
        Row(_CDNA, 16, 128, False, TileConfig(64, 64, 4, 1), "64 KB of shared memory"),
        Row(_CDNA, 16, 256, True, TileConfig(32, 32, 4, 1), "64 KB of shared memory"),
        Row(_ALL, 16, 64, False, TileConfig(128, 128, 8, 3), "fewest instructions per product; two stages: see above"),
        Row(_ALL, 16, 128, False, TileConfig(128, 64, 8, 3), "no spills, 98 KB of shared memory"),
        Row(_WGMMA, 16, 256, False, TileConfig(128, 32, 8, 3), "widest tile without spills"),
        Row(_ALL, 16, 256, False, TileConfig(64, 32, 8, 2), "128 rows spill, shared memory"),
        Row(_ALL, 16, 16, True, TileConfig(128, 128, 8, 2), "no spills"),
        Row(_ALL, 16, 64, True, TileConfig(128, 64, 8, 2), "232 registers"),
        Row(_ALL, 16, 128, True, TileConfig(128, 32, 8, 2), "254 registers"),
        Row(_ALL, 16, 256, True, TileConfig(32, 32, 4, 2), "wider tiles spill"),
        Row(_ALL, 32, 32, False, TileConfig(64, 64, 8, 2), "244 registers; products are FMAs"),
        Row(_ALL, 32, 16, True, TileConfig(32, 32, 4, 2), "64 queries spill"),
        Row(_ALL, 32, 64, True, TileConfig(64, 32, 8, 2), "4 warps spill"),
        Row(_ALL, 32, 128, True, TileConfig(64, 16, 8, 2), "32 keys spill"),
        Row(_ALL, 32, 256, False, TileConfig(16, 16, 4, 2), "wider tiles spill"),
        Row(_ALL, 32, 256, True, TileConfig(32, 16, 8, 2), "180 registers"),
    ),
    "banded_dq": (
        Row(_CDNA, 16, 64, False, TileConfig(128, 32, 4, 2), "no spills, 64 KB of shared memory"),
        Row(_CDNA, 16, 256, True, TileConfig(32, 32, 4, 1), "64 KB of shared memory"),
        Row(_ALL, 16, 32, False, TileConfig(128, 64, 4, 3), "fewest instructions per product"),
        Row(_SM_90, 16, 64, False, TileConfig(128, 64, 8, 3), "whole warp groups, 173 registers"),
        Row(_ALL, 16, 64, False, TileConfig(128, 32, 4, 3), "32 rows a warp halve what it reads of k and v"),
        Row(_ALL, 16, 128, False, TileConfig(128, 64, 8, 2), "2.6 instructions per product; 64 x 32: 3.5"),
        Row(_SM_80_100, 16, 256, False, TileConfig(64, 32, 8, 2), "no spills"),
        Row(_ALL, 16, 256, False, TileConfig(32, 32, 4, 2), "fits 100 KB of shared memory; 64 queries spill on sm_90"),
        Row(_ALL, 16, 64, True, TileConfig(64, 32, 4, 3), "128 queries spill"),
        Row(_ALL, 16, 256, True, TileConfig(32, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 32, True, TileConfig(64, 32, 4, 2), "247 registers"),
        Row(_ALL, 32, 64, True, TileConfig(32, 32, 4, 2), "64 queries on 4 warps spill"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 4, 2), "wider tiles spill"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 4, 2), "least spills of what was tried"),
    ),
    "banded_dkdv": (
        Row(_CDNA, 16, 64, False, TileConfig(32, 128, 4, 2), "no spills, 64 KB of shared memory"),
        Row(_CDNA, 16, 256, True, TileConfig(32, 32, 4, 1), "64 KB of shared memory"),
        Row(_ALL, 16, 16, False, TileConfig(64, 128, 4, 3), "fewest instructions per product"),
        Row(_SM_90, 16, 32, False, TileConfig(64, 64, 4, 3), "128 keys spill"),
        Row(_ALL, 16, 32, False, TileConfig(32, 128, 4, 3), "64 queries spill"),
        Row(_SM_90, 16, 64, False, TileConfig(64, 64, 4, 3), "fewest instructions per product"),
        Row(_CONSUMER, 16, 64, False, TileConfig(32, 64, 4, 3), "128 keys spill"),
        Row(_ALL, 16, 64, False, TileConfig(32, 128, 4, 3), "32 keys a warp halve what it reads of q and d_out"),
        Row(_ALL, 16, 128, False, TileConfig(32, 64, 4, 3), "3.3 instructions per product"),
        Row(_SM_80, 16, 256, False, TileConfig(32, 64, 8, 2), "no spills"),
        Row(_SM_90, 16, 256, False, TileConfig(16, 32, 4, 2), "64 keys spill"),
        Row(_ALL, 16, 256, False, TileConfig(16, 64, 8, 2), "shared memory"),
        Row(_SM_90, 16, 64, True, TileConfig(64, 64, 4, 3), "no spills"),
        Row(_ALL, 16, 64, True, TileConfig(16, 64, 4, 3), "32 queries spill"),
        Row(_ALL, 16, 128, True, TileConfig(32, 32, 4, 2), "no spills"),
        Row(_ALL, 16, 256, True, TileConfig(16, 32, 8, 2), "no spills"),
        Row(_ALL, 32, 32, True, TileConfig(32, 64, 4, 2), "250 registers"),
        Row(_ALL, 32, 64, True, TileConfig(32, 32, 4, 2), "64 keys on 4 warps spill"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 4, 2), "32 x 32 spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 4, 2), "no spills"),
    ),
    "banded_dkdv_globals": (  # block_n is the number of global keys in a tile, 16 or 64
        Row(_ALL, 16, 64, True, TileConfig(32, 64, 4, 2), "4.9 instructions per product"),
        Row(_ALL, 16, 128, True, TileConfig(16, 64, 4, 2), "253 registers"),
        Row(_ALL, 16, 256, True, TileConfig(16, 64, 8, 2), "253 registers"),
        Row(_ALL, 32, 64, True, TileConfig(16, 64, 4, 2), "180 registers"),
        Row(_ALL, 32, 256, True, TileConfig(16, 64, 8, 1), "166 registers"),
    ),
    "global_forward": (
        Row(_ALL, 16, 32, True, TileConfig(16, 128, 4, 2), "no spills"),
        Row(_ALL, 16, 64, True, TileConfig(16, 64, 4, 3), "128 keys spill on sm_90 and sm_100"),
        Row(_ALL, 16, 128, True, TileConfig(16, 64, 4, 2), "no spills"),
        Row(_ALL, 16, 256, True, TileConfig(16, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 64, True, TileConfig(16, 64, 4, 2), "no spills"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 4, 2), "no spills"),
    ),
    "global_forward_many": (
        Row(_ALL, 16, 64, True, TileConfig(64, 64, 4, 2), "no spills"),
        Row(_ALL, 16, 128, True, TileConfig(64, 64, 8, 2), "no spills"),
        Row(_ALL, 16, 256, True, TileConfig(64, 32, 8, 2), "no spills"),
        Row(_ALL, 32, 64, True, TileConfig(16, 64, 4, 2), "no spills"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 4, 2), "no spills"),
    ),
    "global_dq": (
        Row(_ALL, 16, 64, True, TileConfig(16, 32, 4, 3), "with 64 keys every warp would compute all products"),
        Row(_ALL, 16, 128, True, TileConfig(16, 32, 4, 2), "64 keys spill"),
        Row(_ALL, 16, 256, True, TileConfig(16, 32, 8, 2), "no spills"),
        Row(_ALL, 32, 64, True, TileConfig(16, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 8, 2), "no spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 8, 2), "no spills"),
    ),
    "global_dq_many": (
        Row(_ALL, 16, 64, True, TileConfig(64, 32, 4, 2), "no spills"),
        Row(_ALL, 16, 128, True, TileConfig(64, 32, 8, 2), "no spills"),
        Row(_ALL, 16, 256, True, TileConfig(32, 16, 8, 2), "no spills"),
        Row(_ALL, 32, 64, True, TileConfig(32, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 4, 2), "no spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 8, 2), "no spills"),
    ),
    "global_dkdv_many": (
        Row(_ALL, 16, 64, True, TileConfig(32, 32, 4, 2), "64 keys spill"),
        Row(_ALL, 16, 128, True, TileConfig(32, 64, 8, 1), "no spills"),
        Row(_ALL, 16, 256, True, TileConfig(32, 32, 8, 1), "no spills"),
        Row(_ALL, 32, 64, True, TileConfig(16, 32, 4, 1), "32 queries spill"),
        Row(_ALL, 32, 128, True, TileConfig(16, 32, 8, 1), "no spills"),
        Row(_ALL, 32, 256, True, TileConfig(16, 16, 8, 1), "no spills"),
    ),
}
# fmt: on


def _parse(override: str) -> dict[str, TileConfig]:
    """Reads the override into configurations by kernel; the key "" stands for every kernel that is not named."""
    configs = {}
    for part in override.split(","):
        match = _OVERRIDE.fullmatch(part.strip())
        if match is None or match[1] not in (None, *KERNELS):
            raise ValueError(
                f"LED_KERNELS_TRITON_CONFIG has {part!r}; give BLOCK_MxBLOCK_NxWARPSxSTAGES, or KERNEL=… with one of "
                f"{', '.join(KERNELS)}."
            )
        configs[match[1] or ""] = TileConfig(*(int(n) for n in match.groups()[1:]))
    return configs
