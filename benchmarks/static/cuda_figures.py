"""This module reads what nvcc made of each kernel in csrc/cuda from the machine code of the built extension."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from benchmarks.static import sass
from benchmarks.static.control_flow import FlowGraph
from benchmarks.static.gpus import GPUS

_INSTANCE = re.compile(
    r"led::cuda::(?P<kernel>\w+)_kernel<"
    r"led::cuda::(?:TensorCoreProducts<led::cuda::(?P<element>\w+), |FmaProducts<)"
    r"(?P<head_dim>\d+), (?P<rows_per_lane>\d+), (?P<columns>\d+), (?P<warps>\d+)(?:, (?:true|false))?>"
    r"(?:, (?P<dropout>true|false))? ?>\("
)
_ELEMENTS = {"Half": "float16", "BFloat16": "bfloat16", None: "float32"}
_TRAP = ("sm_75", "BFloat16")  # the host refuses that dtype there


@dataclass(frozen=True)
class Row:
    """Holds the figures of one kernel for one target; an empty one is not defined for it.

    Loops are those of one warp, and HMMAs are counted in products of shape m16n8k16, two instructions each on sm_75.

    Attributes:
        element: float16 or bfloat16 on tensor cores; float32: multiply-adds, for any dtype.
        head_dim: for float32 the largest that the kernel takes.
        dropout: False for a kernel that was compiled for calls without, True for one that can have it.
        rows, columns, warps: of a block's tile. A warp has ``rows / warps`` of the rows.
        registers: per thread.
        stack: bytes of local memory per thread.
        spills: instructions that read or write local memory.
        shared: bytes per block, from the kernel's tiles as in SharedTiles of csrc/cuda/tile_io.cuh.
        resident_blocks: blocks per multiprocessor, by registers, shared memory and warps.
        hmma: tensor-core instructions of the whole kernel.
        interior_size, interior_hmma: instructions of the interior loop as they stand in the text, and its HMMAs.
        interior: instructions per HMMA of its iterations that enter no loop within, such as that of dropout's draws,
            with the rarely taken branch that rescales the accumulators. Empty where every iteration enters one.
        interior_mask: those of the same instructions that masks are made of; rescaling and the loop's end have a few.
        masked: as ``interior``, for tiles at the edge of the band, neither gathered nor with padding.
        nvcc: the release that compiled it.
    """

    kernel: str
    target: str
    element: str
    head_dim: int
    dropout: bool
    rows: int
    columns: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    resident_blocks: int
    hmma: int = 0
    interior_size: int | None = None
    interior_hmma: int | None = None
    interior_mask: int | None = None
    interior: float | None = None
    masked: float | None = None
    nvcc: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, bool, int, int, int]:
        """Says what the figures are of."""
        tile = (self.rows, self.columns, self.warps)
        return (self.kernel, self.target, self.element, self.head_dim, self.dropout, *tile)

    def __str__(self) -> str:
        return (
            f"{self.kernel} {self.target} {self.element} head_dim {self.head_dim}{', dropout' * self.dropout}, "
            f"tile {self.rows}x{self.columns}, {self.warps} warp{'s' * (self.warps > 1)}"
        )

    @property
    def uses_tensor_cores(self) -> bool:
        return self.element != "float32"

    @property
    def shared_limit(self) -> int:
        return GPUS[self.target].shared_per_block

    @property
    def tile_hmma(self) -> int:
        """Counts the HMMAs that one warp needs for a tile."""
        macs = sass.PRODUCTS[f"_{self.kernel}_kernel"] * self.rows * self.columns * self.head_dim
        return macs // self.warps // sass.HMMA_MACS


def rows_of_cubin(cubin: bytes) -> list[Row]:
    """Returns a row for each of its kernels that is an instance for tiles and exists on the target."""
    text = sass.disassemble(cubin)
    nvcc = re.search(rb"Cuda compilation tools, release ([\d.]+)", cubin)
    return rows_of(text, sass.resources_by_function(cubin), nvcc[1].decode() if nvcc else "unknown")


def rows_of(text: str, resources: dict[str, sass.Resources], nvcc: str) -> list[Row]:
    """Returns these rows from nvdisasm's and cuobjdump's text.

    Without the kernels that only add up what splits left, and without the bfloat16 kernels of sm_75, which are a trap.
    """
    target = re.search(r"^\s*\.target\s+(sm_\d+)", text, re.MULTILINE)[1]
    functions = sass.functions(text)
    rows = []
    for name, demangled in zip(functions, _demangle(list(functions)), strict=True):
        instance = _INSTANCE.search(demangled)
        if (
            instance
            and f"_{instance['kernel']}_kernel" in sass.PRODUCTS
            and (target, instance["element"]) != _TRAP
        ):
            rows.append(_row(instance, target, functions[name], resources[name], nvcc))
    return rows


def _row(instance: re.Match[str], target: str, function: str, resources: sass.Resources, nvcc: str) -> Row:
    head_dim, rows_per_lane, columns, warps = (
        int(instance[name]) for name in ("head_dim", "rows_per_lane", "columns", "warps")
    )
    element, dropout = _ELEMENTS[instance["element"]], instance["dropout"] != "false"
    rows = 8 * rows_per_lane * warps
    row_operands = 1 if instance["kernel"].endswith("forward") else 2
    stages, element_size = (1, 4) if element == "float32" else (2, 2)
    shared = element_size * head_dim * (row_operands * rows + 2 * stages * columns)
    graph = sass.flow_graph(function)
    opcodes = graph.opcodes()
    return Row(
        kernel=instance["kernel"],
        target=target,
        element=element,
        head_dim=head_dim,
        dropout=dropout,
        rows=rows,
        columns=columns,
        warps=warps,
        registers=resources.registers,
        stack=resources.stack,
        spills=opcodes["LDL"] + opcodes["STL"],
        shared=shared,
        resident_blocks=GPUS[target].resident_blocks(resources.registers, shared, warps),
        hmma=opcodes["HMMA"],
        **(_loop_figures(graph, dropout) if opcodes["HMMA"] else {}),
        nvcc=nvcc,
    )


def _loop_figures(graph: FlowGraph, dropout: bool) -> dict[str, int | float | None]:
    """Returns the figures of the interior loop and of the masked one; none if these are not the kernel's loops."""
    loops = sass.loops(graph)
    straight = [_without_inner_loops(graph, loop) for loop in loops]
    kinds = sass.kinds([body or loop for body, loop in zip(straight, loops, strict=True)], dropout)
    if sorted(kinds) != ["interior", "masked"]:
        return {}
    by_kind = dict(zip(kinds, zip(loops, straight, strict=True), strict=True))
    loop, body = by_kind["interior"]
    hmma = loop.tensor_macs / sass.HMMA_MACS
    return {
        "interior_size": loop.size,
        "interior_hmma": round(hmma),
        "interior_mask": (body or loop).mask_instructions,
        **{kind: body and round(body.size / hmma, 2) for kind, (_, body) in by_kind.items()},
    }


def _without_inner_loops(graph: FlowGraph, loop: sass.Loop) -> sass.Loop | None:
    """Returns the iteration that enters no loop within; None where each has to."""
    body = sass.Loop(loop.header, tuple(graph.instructions(graph.without_inner_loops(loop.header))))
    return body if body.tensor_macs == loop.tensor_macs else None


def _demangle(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
