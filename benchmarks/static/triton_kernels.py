"""``python -m benchmarks.static.triton_kernels`` shows what compilers made of the Triton kernels, with no GPU.

Compiles the real launchers for every target (:mod:`benchmarks.static.fake_driver`) and reads registers, stack, loops
and tensor-core instructions from the machine code. The table holds no measured time: its columns are explained by
:class:`benchmarks.static.table.Row`.

Without options the short list is compiled, its rows in the table are replaced and the others kept. ``--check`` writes
nothing: it ends with status 1, naming each figure, when one is worse than the committed one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.errors import TritonError

from benchmarks.harness import table
from benchmarks.static import sass
from benchmarks.static.cases import DTYPES, OPS, Case, everything, launches, short_list
from benchmarks.static.gpus import TARGETS
from benchmarks.static.table import DEFAULT, Row, violations, worse, write_sorted
from benchmarks.static.triton_figures import rows_of


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    cases = _selected(arguments)
    if not cases:
        print("no case fits the filters", file=sys.stderr)
        return 2
    if arguments.loops:
        for case in cases:
            if case.target.startswith("gfx"):
                print(f"\n{case}: no reader for the loops of AMD's machine code")
                continue
            for launch in launches(case):
                print(f"\n{case}")
                sass.print_loops(launch)
        return 0
    rows, failed = compile_rows(cases, arguments.jobs)
    committed = table.read(arguments.table, Row) if arguments.table.exists() else []
    problems = failed + [problem for row in rows for problem in violations(row)]
    if arguments.check:
        problems += compare(rows, committed)
    else:
        new = {row.key for row in rows}
        write_sorted(arguments.table, [*rows, *(row for row in committed if row.key not in new)])
        print(f"{len(rows)} rows written to {arguments.table}")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def compile_rows(cases: Sequence[Case], jobs: int) -> tuple[list[Row], list[str]]:
    """Returns the rows of all cases, compiled in ``jobs`` processes, and what could not be compiled."""
    rows, failed = [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures: dict[Future[list[Row]], Case] = {pool.submit(rows_of, case): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compiling", disable=None):
            try:
                rows += future.result()
            except (TritonError, RuntimeError) as error:  # a failed pass is a RuntimeError
                failed.append(f"{futures[future]}: {str(error).strip().splitlines()[-1]}")
    return sorted(rows, key=lambda row: row.key), failed


def compare(rows: Sequence[Row], committed: Sequence[Row]) -> list[str]:
    """Returns figures that are worse than the committed ones, and rows that are not committed.

    Figures of another Triton are not comparable: then that is the only thing said.
    """
    before = {row.key: row for row in committed}
    versions = {row.triton for row in committed} - {triton.__version__}
    if versions:
        return [f"the table is of Triton {', '.join(sorted(versions))}, this is {triton.__version__}"]
    problems = []
    for row in rows:
        problems += worse(row, before[row.key]) if row.key in before else [f"{row}: not in the table"]
    return problems


def _selected(arguments: argparse.Namespace) -> list[Case]:
    filters = {
        "op": arguments.op,
        "target": arguments.target,
        "dtype": arguments.dtype,
        "head_dim": arguments.head_dim,
    }
    cases = everything() if arguments.all else short_list()
    return [
        case
        for case in cases
        if all(not wanted or getattr(case, name) in wanted for name, wanted in filters.items())
    ]


def _start_worker() -> None:
    torch.set_num_threads(1)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.triton_kernels",
        description="Compiles the Triton kernels for GPUs that need not be here, and reads what came out.",
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument(
        "--all", action="store_true", help="everything that is shipped, on every target (hours)"
    )
    parser.add_argument("--loops", action="store_true", help="only print the loops of each kernel")
    parser.add_argument("--op", nargs="+", choices=OPS, help="only these calls of the backend")
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="only these targets")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these types")
    parser.add_argument("--head-dim", nargs="+", type=int, help="only these head dimensions")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes (all cores)")
    parser.add_argument("--table", type=Path, default=DEFAULT, help="%(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
