"""The table of static figures, a row per compiled kernel: what it must keep to, and when it is worse than before."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

DEFAULT = Path(__file__).parents[1] / "results" / "static_gpu.csv"

REGISTERS_MORE = 8
"""Registers per thread that a row may have more than the committed one: one step of their allocation."""
RELATIVE = 0.02
"""By how much other figures may be worse, relative to the committed ones."""

RowType = TypeVar("RowType")


@dataclass(frozen=True)
class Row:
    """Figures of one compiled kernel; an empty one is not defined for it, or the model does not hold.

    Attributes:
        config: tile sizes and other constants that were compiled in.
        stack, spills: bytes of local memory per thread; registers that AMD's compiler spilled.
        shared, shared_limit: bytes per block, and how many the target allows.
        resident_blocks: blocks per multiprocessor, by registers, shared memory and warps.
        tensor: tensor-core instructions in the text, by opcode.
        loops: of each loop that uses tensor cores, in the order of the text: its kind, instructions of a warp per
            m16n8k16 HMMA's worth of needed products (or all of them, where the machine code does not say their
            shape), and how often a program runs it at the reference shape, on average.
        interior, masked: instructions per needed HMMA in the interior loop, and in the masked one that runs most.
        tensor_share: predicted by the cycle model for the interior loop.
        executed: instructions that the whole forward executes per HMMA that the exact band needs.
        traffic: bytes that the forward moves by the model of L2, over those of q, k, v and out.
        note: why figures are missing, or what is wrong with the loops.
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
    tensor: str = ""
    loops: str = ""
    interior: float | None = None
    masked: float | None = None
    tensor_share: float | None = None
    executed: float | None = None
    traffic: float | None = None
    note: str = ""
    triton: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, bool, bool, int]:
        """What it is the figures of. Kernels of two calls may have the same name."""
        variant = (self.dropout, self.tma, self.num_globals)
        return (self.op, self.kernel, self.target, self.dtype, self.head_dim, *variant)

    def __str__(self) -> str:
        variant = ", dropout" * self.dropout + ", tma" * self.tma
        if self.num_globals > 1:
            variant += f", {self.num_globals} globals"
        return f"{self.op} {self.kernel} {self.target} {self.dtype} head_dim {self.head_dim}{variant}"


def violations(row: Row) -> list[str]:
    """What no kernel may do, whatever the committed table says."""
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
    """What got worse, each with both figures."""
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
    for name in ("interior", "masked", "executed", "traffic"):
        compare(name, RELATIVE * (getattr(committed, name) or 0))
    compare("tensor_share", RELATIVE * (committed.tensor_share or 0), sign=-1)
    if _opcodes(row.tensor) != _opcodes(committed.tensor):
        found.append(
            f"{row}: tensor instructions {row.tensor or 'none'}, committed {committed.tensor or 'none'}"
        )
    return found


def read(path: Path = DEFAULT, row_type: type[RowType] = Row) -> list[RowType]:
    with path.open(newline="") as file:
        return [
            row_type(**{field.name: _parse(field.type, line[field.name]) for field in fields(row_type)})
            for line in csv.DictReader(file)
        ]


def write(rows: Iterable[RowType], path: Path = DEFAULT, row_type: type[RowType] = Row) -> None:
    """Sorted by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row_type)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row.key):
            writer.writerow({name: "" if x is None else x for name, x in asdict(row).items()})


def _parse(kind: str, text: str) -> object:
    if kind.endswith("| None") and not text:
        return None
    if kind == "bool":
        return text == "True"
    return {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")](text)


def _opcodes(tensor: str) -> set[str]:
    return set(tensor.split()[::2])
