"""The figures of one compiled launch: read from its machine code, and predicted from that by the models."""

from __future__ import annotations

import dataclasses
from collections import Counter

import triton

from benchmarks.static import amdgcn, executed, l2_model, sass
from benchmarks.static.cases import Case, launches
from benchmarks.static.control_flow import FlowGraph
from benchmarks.static.cycle_model import tensor_share
from benchmarks.static.fake_driver import Launch
from benchmarks.static.gpus import GPUS
from benchmarks.static.ptx_trace import UnknownBranch
from benchmarks.static.table import Row

MODEL_HEADS = 12
"""Heads of the layer whose traffic is modelled: LED-base's."""


def rows_of(case: Case) -> list[Row]:
    """One row for each kernel that the case compiles."""
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
    resident = gpu.resident_blocks(used.registers, metadata.shared, metadata.num_warps)
    figures = {
        "registers": used.registers,
        "stack": used.stack,
        "spills": 0,  # ptxas spills to the stack
        "resident_blocks": resident,
        "tensor": _listed(sass.tensor_opcodes(graph)),
    }
    if loops := sass.loops(graph):
        figures |= _loop_figures(case, launch, graph, loops)
    if case.op == "banded_forward":
        shape = dataclasses.replace(case.shape, heads=MODEL_HEADS)
        sizes = (launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"])
        element_size = launch.arguments["q_ptr"].element_size()
        ratio = l2_model.traffic_ratio(shape, *sizes, resident * gpu.multiprocessors, gpu.l2, element_size)
        figures["traffic"] = round(ratio, 3)
    return figures


def _loop_figures(case: Case, launch: Launch, graph: FlowGraph, loops: list[sass.Loop]) -> dict[str, object]:
    figures: dict[str, object] = {}
    kinds = sass.kinds(loops, case.dropout)
    try:
        execution = executed.execute(launch, graph)
    except (UnknownBranch, executed.UnknownLoops) as error:
        figures["note"] = str(error)
        runs = [0.0] * len(loops)
    else:
        runs = execution.mean_iterations
        if case.op == "banded_forward":
            figures["executed"] = round(execution.instructions / executed.needed_hmmas(case.shape), 3)
    figures["loops"] = ", ".join(
        f"{kind} {loop.size / (loop.hmmas(launch) or 1):.4g} x {n:.3g}"
        for kind, loop, n in zip(kinds, loops, runs, strict=True)
    )
    for wanted in ("interior", "masked"):
        # before loops over other tiles, such as those of the global keys
        found = [
            (loop.tiles(launch) > 0, n, loop)
            for kind, loop, n in zip(kinds, loops, runs, strict=True)
            if kind == wanted and loop.tensor_macs
        ]
        if not found:
            continue
        is_whole, _, loop = max(found, key=lambda candidate: candidate[:2])
        hmmas = loop.hmmas(launch)
        figures[wanted] = round(loop.size / hmmas, 3)
        if wanted == "interior":
            if not is_whole:
                figures["note"] = "the interior loop has fewer tensor-core products than its tile needs"
            if rates := GPUS[case.target].rates:
                figures["tensor_share"] = round(tensor_share(loop, hmmas, rates), 3)
    return figures


def _listed(opcodes: Counter[str]) -> str:
    """``HGMMA 32 HMMA 8``"""
    return " ".join(f"{name} {count}" for name, count in sorted(opcodes.items()))
