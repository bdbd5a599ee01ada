"""This module reads the figures of one compiled launch from its machine code."""

from __future__ import annotations

from collections import Counter

import triton

from benchmarks.static import amdgcn, sass
from benchmarks.static.cases import Case, launches
from benchmarks.static.fake_driver import Launch
from benchmarks.static.gpus import GPUS
from benchmarks.static.table import Row


def rows_of(case: Case) -> list[Row]:
    """Returns a row for each kernel that the case compiles."""
    return [row_of(case, launch) for launch in launches(case)]


def row_of(case: Case, launch: Launch) -> Row:
    gpu, metadata = GPUS[case.target], launch.kernel.metadata
    is_amd = case.target.startswith("gfx")
    figures = _amd_figures(launch) if is_amd else _cuda_figures(case, launch)
    return Row(
        op=case.op,
        kernel=launch.name,
        target=case.target,
        dtype=case.dtype,
        head_dim=case.head_dim,
        dropout=case.dropout,
        tma=case.tma,
        num_globals=case.num_globals,
        config=" ".join(f"{name}={value}" for name, value in launch.constexprs.items() if name.isupper()),
        num_warps=metadata.num_warps,
        shared=metadata.shared,
        shared_limit=gpu.shared_per_block,
        triton=triton.__version__,
        **figures,
    )


def _amd_figures(launch: Launch) -> dict[str, object]:
    used = amdgcn.resources(launch.kernel.asm["amdgcn"])
    return {
        "registers": used.registers,
        "stack": used.scratch,
        "spills": used.spills,
        "tensor": _listed(used.mfma),
    }


def _cuda_figures(case: Case, launch: Launch) -> dict[str, object]:
    gpu, metadata, cubin = GPUS[case.target], launch.kernel.metadata, launch.kernel.asm["cubin"]
    used, graph = sass.resources(cubin), sass.flow_graph(sass.disassemble(cubin))
    figures = {
        "registers": used.registers,
        "stack": used.stack,
        "spills": 0,  # ptxas spills to the stack
        "resident_blocks": gpu.resident_blocks(used.registers, metadata.shared, metadata.num_warps),
        "instructions": graph.opcodes().total(),
        "tensor": _listed(sass.tensor_opcodes(graph)),
    }
    return figures | _loop_figures(case, launch, sass.loops(graph))


def _loop_figures(case: Case, launch: Launch, loops: list[sass.Loop]) -> dict[str, object]:
    figures: dict[str, object] = {}
    kinds = sass.kinds(loops, case.dropout)
    figures["loops"] = ", ".join(
        f"{kind} {loop.size / (loop.hmmas(launch) or 1):.4g}" for kind, loop in zip(kinds, loops, strict=True)
    )
    interior, masked = (_products(launch, loops, kinds, kind) for kind in ("interior", "masked"))
    if interior:
        figures["interior"] = _per_hmma(launch, interior[0])
        if not interior[0].tiles(launch):
            figures["note"] = "the interior loop has fewer tensor-core products than its tile needs"
    if masked:
        # the tiles at the edge of the band come just before those within it, other masked ones elsewhere
        before = [loop for loop in masked if interior and loop.header < interior[0].header]
        figures["masked"] = _per_hmma(launch, before[-1] if before else masked[0])
    return figures


def _products(launch: Launch, loops: list[sass.Loop], kinds: list[str], wanted: str) -> list[sass.Loop]:
    """Returns the loops of a kind that multiply whole tiles, or else those over other tiles, such as global keys."""
    found = [loop for kind, loop in zip(kinds, loops, strict=True) if kind == wanted and loop.tensor_macs]
    return [loop for loop in found if loop.tiles(launch)] or found


def _per_hmma(launch: Launch, loop: sass.Loop) -> float:
    return round(loop.size / loop.hmmas(launch), 3)


def _listed(opcodes: Counter[str]) -> str:
    """Lists counts, as in ``HGMMA 32 HMMA 8``."""
    return " ".join(f"{name} {count}" for name, count in sorted(opcodes.items()))
