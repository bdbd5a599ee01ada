"""The kernels of csrc/cuda as PTX: nvcc's for sm_80, cut to one kernel a module."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
_PRODUCTS = {
    torch.float32: "FmaProductsI",
    torch.float16: "TensorCoreProductsINS0_4HalfE",
    torch.bfloat16: "TensorCoreProductsINS0_8BFloat16E",
}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template.

    Attributes:
        name: of the template.
        ptx: a module that holds it alone.
        rows: of its tiles, and ``columns``.
    """

    name: str
    ptx: str
    head_dim: int
    rows: int
    columns: int


def nvcc_path() -> str | None:
    """Returns the nvcc of CUDA_HOME, else of PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


@functools.cache
def compile_ptx(source: str, head_dim: int) -> str:
    """``csrc/cuda/<source>.cu`` as a module with all of its kernels."""
    command = [
        nvcc_path(),
        "-ptx",
        "-arch=compute_80",
        "-std=c++17",
        "-O3",
        "-lineinfo",
        f"-DLED_HEAD_DIM={head_dim}",
    ]
    command += [str(_SOURCES / f"{source}.cu"), "-o", "/dev/stdout"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def kernels(ptx: str, name: str, dtype: torch.dtype, *, may_drop: bool | None = None) -> list[Kernel]:
    """The instances of a template for a dtype, few rows first.

    Args:
        may_drop: of a template that has it as a parameter; those for fp32 have it on.
    """
    head, *entries = re.split(r"^(?=\.visible \.entry)", ptx, flags=re.MULTILINE)
    drops = "" if may_drop is None else f"Lb{int(may_drop or dtype == torch.float32)}E"
    pattern = rf"\d{name}INS0_\d+{_PRODUCTS[dtype]}((?:Li\d+E)+)(?:Lb[01]E)?EE{drops}EEv"
    found = []
    for entry in entries:
        if match := re.search(pattern, entry.partition("(")[0]):
            head_dim, rows_per_lane, columns, warps = map(int, re.findall(r"\d+", match[1]))
            found.append(Kernel(name, head + entry, head_dim, 8 * rows_per_lane * warps, columns))
    return sorted(found, key=lambda kernel: kernel.rows)
