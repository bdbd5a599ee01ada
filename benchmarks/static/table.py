"""The table of static figures has a row per compiled kernel; this module knows its limits, and what got worse."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.harness.table import RESULTS, write

DEFAULT = RESULTS / "static_gpu.csv"

REGISTERS_MORE = 8
"""Registers per thread that a row may have more than the committed one: one step of their allocation."""
RELATIVE = 0.02
"""By how much other figures may be worse, relative to the committed ones."""


@dataclass(frozen=True)
class Row:
    """Holds the figures of one compiled kernel; an empty one is not defined for it.

    Attributes:
        config: tile sizes and other constants that were compiled in.
        stack, spills: bytes of local memory per thread; registers that AMD's compiler spilled.
        shared, shared_limit: bytes per block, and how many the target allows.
        resident_blocks: blocks per multiprocessor, by registers, shared memory and warps.
        instructions: of the whole machine code that can be reached.
        tensor: tensor-core instructions in the text, by opcode.
        loops: of each loop that uses tensor cores, in the order of the text: its kind, and instructions of a warp per
            m16n8k16 HMMA's worth of needed products (or all of them, where the machine code does not say their shape).
        interior: instructions per needed HMMA in the interior loop.
        masked: the same in the masked loop for the tiles at the edge of the band: of those that multiply whole tiles
            the last before the interior loop, or else the first one.
        note: what is wrong with the loops.
    """

    op: str
    kernel: str
    target: str
    dtype: str
    head_dim: int
    dropout: bool
    tma: bool
    num_globals: int
    config: str
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    resident_blocks: int | None = None
    instructions: int | None = None
    tensor: str = ""
    loops: str = ""
    interior: float | None = None
    masked: float | None = None
    note: str = ""
    triton: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, bool, bool, int]:
        """Says what the figures are of. Kernels of two calls may have the same name."""
        variant = (self.dropout, self.tma, self.num_globals)
        return (self.op, self.kernel, self.target, self.dtype, self.head_dim, *variant)

    @property
    def query_rows(self) -> int | None:
        """Counts the queries of a tile of the banded forward, which reads keys and values once for all of them."""
        found = re.search(r"\bBLOCK_M=(\d+)", self.config)
        return int(found[1]) if found and self.op == "banded_forward" else None

    def __str__(self) -> str:
        variant = ", dropout" * self.dropout + ", tma" * self.tma
        if self.num_globals > 1:
            variant += f", {self.num_globals} globals"
        return f"{self.op} {self.kernel} {self.target} {self.dtype} head_dim {self.head_dim}{variant}"


def violations(row: Row) -> list[str]:
    """Returns what no kernel may do and one does, whatever the committed table says."""
    found = []
    if row.stack:
        found.append(f"{row}: {row.stack} B of stack")
    if row.spills:
        found.append(f"{row}: {row.spills} registers spilled")
    if row.shared > row.shared_limit:
        found.append(f"{row}: {row.shared} B of shared memory, the target has {row.shared_limit}")
    if row.note:
        found.append(f"{row}: {row.note}")
    return found


def worse(row: Row, committed: Row) -> list[str]:
    """Returns what got worse, each with both figures."""
    found = []

    def compare(name: str, allowed: float, sign: int = 1) -> None:
        now, before = getattr(row, name), getattr(committed, name)
        if before is None:
            return
        if now is None or sign * now > sign * before + allowed:
            found.append(f"{row}: {name} {now}, committed {before}")

    compare("registers", REGISTERS_MORE)
    compare("stack", 0)
    compare("spills", 0)
    compare("resident_blocks", 0, sign=-1)
    compare("query_rows", 0, sign=-1)
    for name in ("instructions", "interior", "masked"):
        compare(name, RELATIVE * (getattr(committed, name) or 0))
    if _opcodes(row.tensor) != _opcodes(committed.tensor):
        found.append(
            f"{row}: tensor instructions {row.tensor or 'none'}, committed {committed.tensor or 'none'}"
        )
    return found


class Keyed(Protocol):
    """Describes a row that is known by a key."""

    @property
    def key(self) -> tuple: ...


def write_sorted(path: Path, rows: Iterable[Keyed]) -> None:
    """Writes a new file of the rows, in the order of their keys."""
    write(path, sorted(rows, key=lambda row: row.key))


def _opcodes(tensor: str) -> set[str]:
    return set(tensor.split()[::2])
