"""``python -m benchmarks.static.cuda_kernels`` shows what nvcc made of the CUDA kernels, with no GPU.

Reads the machine code of the built extension, for every architecture in it, and writes a table of registers, stack,
shared memory and loops; :class:`benchmarks.static.cuda_figures.Row` explains the columns. None is a measured time.

``--check`` writes nothing: it ends with status 1, naming each figure, when a kernel breaks a limit or differs from the
committed table. The table is of one release of nvcc; what another one compiled is held to the limits alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

from benchmarks.harness import table
from benchmarks.static import sass
from benchmarks.static.cuda_figures import Row, rows_of_cubin
from benchmarks.static.table import write_sorted

DEFAULT = table.RESULTS / "static_cuda.csv"

FORWARD_PER_HMMA = 5.0
"""Instructions per HMMA that the interior loop of the banded forward has at most, on sm_80 at head_dim 64."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.extension is None:
        print("led_kernels._C is not built; name an extension with --extension", file=sys.stderr)
        return 2
    try:
        cubins = sass.cubins(arguments.extension)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        largest_first = sorted(cubins, key=len, reverse=True)
        rows = [row for rows in pool.map(rows_of_cubin, largest_first) for row in rows]
    problems = [problem for row in rows for problem in violations(row)]
    if arguments.check:
        committed = table.read(arguments.table, Row)
        built_by, of_table = ({row.nvcc for row in side} for side in (rows, committed))
        if built_by == of_table:
            problems += differences(rows, committed)
        else:
            print(
                f"compiled by nvcc {', '.join(sorted(built_by))}, the table is of {', '.join(sorted(of_table))}: "
                "only the limits are checked"
            )
        print(f"{len(rows)} kernels of {arguments.extension} checked, {len(problems)} problems")
    else:
        write_sorted(arguments.table, rows)
        print(f"{len(rows)} rows written to {arguments.table}")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


def violations(row: Row) -> list[str]:
    """Returns what no kernel may do and one does, whatever the committed table says."""
    found = []
    if row.shared > row.shared_limit:
        found.append(f"{row}: {row.shared} B of shared memory, the target has {row.shared_limit}")
    if not row.uses_tensor_cores:
        return found
    if row.stack or row.spills:
        found.append(f"{row}: {row.stack} B of stack, {row.spills} accesses to it")
    if row.hmma == 0:
        found.append(f"{row}: no tensor-core instruction")
    elif row.interior_hmma is None:
        found.append(f"{row}: its loops are not one with masks and one without")
    elif row.interior_hmma != row.tile_hmma:
        found.append(f"{row}: {row.interior_hmma} HMMA in the interior loop, a tile takes {row.tile_hmma}")
    is_gated = (row.kernel, row.target, row.head_dim) == ("banded_forward", "sm_80", 64) and not row.dropout
    if is_gated and (row.interior is None or row.interior > FORWARD_PER_HMMA):
        found.append(
            f"{row}: {row.interior} instructions per HMMA in the interior loop, above {FORWARD_PER_HMMA}"
        )
    return found


def differences(rows: Iterable[Row], committed: Iterable[Row]) -> list[str]:
    """Returns every figure that is not the committed one, and kernels that are on one side only."""
    now, before = ({row.key: row for row in side} for side in (rows, committed))
    found = [f"{row}: not in the table" for key, row in now.items() if key not in before]
    found += [f"{row}: in the table, not in the extension" for key, row in before.items() if key not in now]
    for key in now.keys() & before.keys():
        for name in (field.name for field in fields(Row)):
            figure, expected = getattr(now[key], name), getattr(before[key], name)
            if figure != expected:
                found.append(f"{now[key]}: {name} {figure}, committed {expected}")
    return sorted(found)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    built = importlib.util.find_spec("led_kernels._C")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static.cuda_kernels",
        description="Reads what nvcc made of the CUDA kernels from the built extension; no GPU is needed.",
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument(
        "--extension",
        type=Path,
        default=Path(built.origin) if built else None,
        help="the built led_kernels._C (the one that Python would import)",
    )
    parser.add_argument("--table", type=Path, default=DEFAULT, help="%(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
