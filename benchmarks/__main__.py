"""``python -m benchmarks [SUITE]`` measures speed and memory beside the peers, into rows of a CSV, and sums them up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import runner, table
from benchmarks.report import summary
from benchmarks.suites import catalog

ABOUT = {
    **{suite.name: suite.about for suite in catalog.SUITES.values()},
    "quantization": "memory and quality of smaller weights; not timed",
    "learning": "losses of a small model on real papers, which pip downloads; not timed",
    "memory": "what a training step keeps, counted and predicted; not timed",
    "context": "what a rank sends and keeps of a document that is split over 8; not timed",
}
OTHERS = {
    "benchmarks.report.summary": "the figures of runs, and the README's tables",
    "benchmarks.report.plot": "the README's pictures",
    "benchmarks.report.gpu_report": "build, tests and timings of a GPU in one report",
    "benchmarks.static.triton_kernels": "what the compilers made of the Triton kernels; --check gates it",
    "benchmarks.static.cuda_kernels": "what nvcc made of the CUDA kernels; --check gates it",
    "benchmarks.tune": "ranks the tile sizes of the Triton kernels on a GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.suite in summary.UNTIMED:
        suite = summary.UNTIMED[arguments.suite]
        return suite.run(arguments.out, smoke=arguments.smoke, threads=arguments.threads)
    suites = [catalog.SUITES[arguments.suite]] if arguments.suite else catalog.TOGETHER
    groups = [group for suite in suites for group in suite.groups(arguments.smoke)]
    status = runner.run(
        groups,
        arguments.out,
        only=arguments.only,
        repeats=arguments.repeats or (3 if arguments.smoke else runner.REPEATS),
        threads=arguments.threads,
    )
    if status == 0:
        print(summary.report(table.read(arguments.out)))
        if arguments.smoke:
            print("\nThese are tiny shapes: that the run is complete is all that they show.")
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times every provider beside its peers and writes one row per case to a CSV.",
        epilog=_lists(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    together = " and ".join(suite.name for suite in catalog.TOGETHER)
    parser.add_argument(
        "suite", nargs="?", choices=ABOUT, metavar="SUITE", help=f"default: {together}, in one run"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, seconds in all; figures mean nothing"
    )
    parser.add_argument(
        "--only", default="", help="cases whose name holds all these words, as in 'banded cpu'"
    )
    parser.add_argument("--out", type=Path, help="CSV to write; default SUITE.csv, or cpu.csv (smoke.csv)")
    parser.add_argument("--repeats", type=int, help=f"rounds; default {runner.REPEATS} (smoke 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    if arguments.suite in summary.UNTIMED and (arguments.only or arguments.repeats):
        parser.error(f"{arguments.suite} is not timed: it takes neither --only nor --repeats")
    arguments.out = arguments.out or _default_out(arguments.suite, arguments.smoke)
    return arguments


def _default_out(suite: str | None, smoke: bool) -> Path:
    if smoke:
        return table.RESULTS / "smoke.csv"
    if suite in summary.UNTIMED:
        return summary.UNTIMED[suite].DEFAULT
    return catalog.SUITES[suite].out if suite else catalog.CPU


def _lists() -> str:
    """Returns the suites and what else can be run, a line each."""
    lines = ["suites:", *(f"  {name:14}{about}" for name, about in ABOUT.items())]
    lines += ["", "what else can be run:"]
    lines += [f"  python -m {module:34}{about}" for module, about in OTHERS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
