"""Tables of dataclass rows are read from CSV files and written to them here; Row is that of a timed case.

The plots, the summary and the README read nothing else.
"""

from __future__ import annotations

import csv
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO, TypeVar

import torch

RESULTS = Path(__file__).parents[1] / "results"

RowType = TypeVar("RowType")


@dataclass(frozen=True)
class Row:
    """Holds a case, whose ``group`` ran interleaved. Times are of a call; 0: not measured. ``error`` is the gate's."""

    group: str
    what: str
    provider: str
    direction: str
    seqlen: int
    heads: int
    head_dim: int
    window: int
    num_globals: int
    median_ms: float = 0.0
    min_ms: float = 0.0
    repeats: int = 0
    flop: int = 0
    bytes: int = 0
    peak_mib: float = 0.0
    error: float = 0.0
    dtype: str = "float32"
    threads: int = 0
    isa: str = ""
    cpu: str = ""
    torch: str = ""
    transformers: str = ""
    gpu: str = ""
    triton: str = ""


def environment(threads: int) -> dict[str, str | int]:
    """Returns the columns that say what a run ran on."""
    return {
        "threads": threads,
        "isa": instruction_set(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def read(path: Path, row_type: type[RowType] = Row) -> list[RowType]:
    """Reads the rows of a file; fields are of type str, int, float or bool, or None where the cell is empty.

    A field whose column is missing has its default.
    """
    with path.open(newline="") as file:
        return [
            row_type(
                **{
                    field.name: _parse(field.type, line[field.name])
                    for field in fields(row_type)
                    if field.name in line
                }
            )
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[object]) -> None:
    """Writes a new file of rows of one dataclass, of which there is at least one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        _write(file, rows, with_header=True)


def append(path: Path, row: object) -> None:
    """Appends a row, in a new file under its header."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        _write(file, [row], with_header=is_new)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown, from the cells of each line."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _write(file: TextIO, rows: Sequence[object], with_header: bool) -> None:
    writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)  # None becomes an empty cell


def _parse(kind: str, text: str) -> object:
    if kind.endswith("| None") and not text:
        return None
    if kind == "bool":
        return text == "True"
    return {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")](text)


def cpu_model() -> str:
    """Returns the model name of the processor, as lscpu prints it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """Returns what the compiled kernels use, or else what torch does."""
    try:
        from led_kernels.backends import cpu
    except ImportError:
        return torch.backends.cpu.get_cpu_capability().lower()
    return cpu.instruction_set()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
