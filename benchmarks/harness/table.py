"""The CSV: one row per case of one run, with what it ran on. Plots, summary and README read nothing else."""

from __future__ import annotations

import csv
import importlib.metadata
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results"
DEFAULT = RESULTS / "cpu.csv"
GENERATION = RESULTS / "generation.csv"
COMPILED = RESULTS / "compiled.csv"


@dataclass(frozen=True)
class Row:
    """``group`` ran interleaved. Times are of one call; 0 is "not measured". ``error`` is from the gate."""

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
    """The columns that say what a run ran on."""
    return {
        "threads": threads,
        "isa": instruction_set(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def append(path: Path, row: Row) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read(path: Path) -> list[Row]:
    kinds = {"int": int, "float": float, "str": str}
    convert = {field.name: kinds[field.type] for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{key: convert[key](value) for key, value in line.items()}) for line in csv.DictReader(file)
        ]


def cpu_model() -> str:
    """Model name of the processor, as lscpu prints it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the compiled kernels use, or else what torch does."""
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
