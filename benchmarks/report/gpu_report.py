"""``python -m benchmarks.report.gpu_report`` builds, tests, sanitizes and times on one GPU, in ten minutes.

Writes one Markdown and one CSV report. Both grow as the steps are done, under names that end in ``.partial`` until the
run is complete: an interrupted one keeps what it has. A provider is timed after its results were found right
(``benchmarks.harness.verify``). ``--dry-run`` lists what would run, and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import runner, table
from benchmarks.harness.cases import YARDSTICKS, Group
from benchmarks.report.gpu_checks import (
    ROOT,
    TESTS,
    TOOLS,
    Outcome,
    run_pytest,
    run_sanitizer,
    sanitizer_command,
)
from benchmarks.suites import gpu_attention
from led_kernels.dispatch import BackendUnavailable, can_run

DEFAULT = table.RESULTS / "gpu_report.md"
REPEATS = 30
# of the whole time; what is left is for the timings
TESTS_SHARE, TOOL_SHARE = 0.35, 0.08


class Report:
    """Writes ``path`` and the same with the suffix ``.csv``, until :meth:`finish` with ``.partial`` behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.markdown, self.csv = (path.with_suffix(f"{suffix}.partial") for suffix in (".md", ".csv"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.csv.unlink(missing_ok=True)
        self.markdown.write_text("# GPU report\n", encoding="utf-8")

    def add(self, title: str, text: str, level: int = 2) -> None:
        with self.markdown.open("a", encoding="utf-8") as file:
            file.write(f"\n{'#' * level} {title}\n\n{text.strip()}\n")

    def finish(self) -> None:
        for partial in (self.markdown, self.csv):
            if partial.exists():
                partial.replace(partial.with_suffix(""))


@dataclass(frozen=True)
class Step:
    """Is one part of the report.

    Attributes:
        plan: lines that say what it does, for the dry run.
        run: does it within so many seconds and adds to the report; None if it is left out.
        refusal: why it is left out.
    """

    title: str
    plan: tuple[str, ...]
    run: Callable[[Report, float], bool] | None
    share: float = 0.0
    refusal: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    planned = steps(gpu_attention.groups())
    if arguments.dry_run:
        print(describe(planned))
        return 0
    if not torch.cuda.is_available():
        print(
            "The report needs a GPU, and torch sees none here; --dry-run lists what it would do.",
            file=sys.stderr,
        )
        return 2
    return write_report(planned, Report(arguments.out), 60 * arguments.minutes)


def steps(groups: list[Group]) -> list[Step]:
    """Returns everything in its order; ``groups`` are what is timed."""
    tools = [_sanitizer_step(tool, backend) for backend in gpu_attention.BACKENDS for tool in TOOLS]
    return [
        Step("Build", (_text(_INFO),), _build),
        Step("Tests", (_text(TESTS),), functools.partial(_tests, TESTS), TESTS_SHARE),
        *tools,
        Step("Timings", tuple(_plan(groups)), functools.partial(_timings, groups), 1.0),
    ]


def describe(planned: list[Step]) -> str:
    """Returns what would run and what would be left out, and why."""
    here = (
        "" if torch.cuda.is_available() else "torch sees no GPU here: on a machine with one this would run.\n"
    )
    lines = [f"{here}Each step is added to the report when it is done."]
    for step in planned:
        lines += ["", f"{step.title}: left out, {step.refusal}" if step.refusal else f"{step.title}:"]
        lines += [f"  {line}" for line in step.plan]
    return "\n".join(lines)


def write_report(planned: list[Step], report: Report, seconds: float) -> int:
    """Runs the steps and returns the exit status: 0 when all that ran was good, 1 when not, 130 when interrupted."""
    end, is_good = time.monotonic() + seconds, True
    try:
        for number, step in enumerate(planned, 1):
            print(f"[{number}/{len(planned)}] {step.title}", file=sys.stderr)
            if step.run is None:
                report.add(f"{step.title}: left out", step.refusal)
                continue
            limit = min(step.share * seconds, end - time.monotonic())
            is_good &= step.run(report, limit)
    except KeyboardInterrupt:
        print(f"interrupted; so far: {report.markdown} and {report.csv}", file=sys.stderr)
        return 130
    report.finish()
    print(f"{report.path}: {'all good' if is_good else 'something is wrong, see there'}")
    return 0 if is_good else 1


_INFO = (sys.executable, "-m", "led_model", "info")


def _build(report: Report, limit: float) -> bool:
    result = subprocess.run(_INFO, cwd=ROOT, capture_output=True, text=True)
    facts = [result.stdout or result.stderr, f"flash-attn {_version('flash-attn')}"]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts += [
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB",
            f"CUDA {torch.version.cuda}, HIP {torch.version.hip}, {torch.cuda.device_count()} GPUs",
        ]
    report.add("Build", "\n".join(["```text", *facts, "```"]))
    return result.returncode == 0


def _tests(command: Sequence[str], report: Report, limit: float) -> bool:
    outcome, _ = run_pytest(command, limit)
    return _add(report, "Tests", outcome)


def _sanitizer_step(tool: str, backend: str) -> Step:
    title, command = f"compute-sanitizer {tool}, {backend}", sanitizer_command(tool, backend)
    if command is None:
        return Step(title, (), None, refusal="compute-sanitizer is neither on PATH nor in the CUDA toolkit.")
    if torch.cuda.is_available():
        try:
            can_run(backend, torch.device("cuda"), raise_error=True)
        except BackendUnavailable as refusal:
            return Step(title, (), None, refusal=str(refusal))

    def check(report: Report, limit: float) -> bool:
        return _add(report, title, run_sanitizer(tool, command, limit))

    return Step(title, (_text(command),), check, TOOL_SHARE)


def _add(report: Report, title: str, outcome: Outcome) -> bool:
    report.add(f"{title}: {'passed' if outcome.is_good else 'FAILED'}", outcome.text)
    return outcome.is_good


def _timings(groups: list[Group], report: Report, limit: float) -> bool:
    """Writes a table for each group as it is done; a wrong result or an error of ours ends them."""
    report.add("Timings", _HOW_TIMED)
    end = time.monotonic() + limit
    environment = {
        **table.environment(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "triton": _version("triton"),
    }
    for group in groups:
        if time.monotonic() > end:
            report.add(group.name, "Left out: the time is used up.", level=3)
            continue
        try:
            left_out = runner.run_group(group, REPEATS, report.csv, environment)
        except Exception as error:  # whatever a kernel raises on its first GPU belongs into the report
            report.add(f"{group.name}: FAILED", f"{type(error).__name__}: {error}", level=3)
            return False
        rows = [row for row in table.read(report.csv) if row.group == group.name]
        reasons = [f"- {case.name}: left out, {reason}" for case, reason in left_out.items()]
        report.add(group.name, "\n".join([rows_as_markdown(rows), "", *reasons]), level=3)
    return True


_HOW_TIMED = f"""\
Medians of {REPEATS} rounds, fewer where they would take long; within a group the providers take turns. Batch 1. The \
time is between two CUDA events in eager mode, after a write to more memory than the L2 cache holds. FLOP are those of \
the exact band. The error is the largest difference from the fp64 truth, relative to the largest value."""


def rows_as_markdown(rows: list[table.Row]) -> str:
    """Returns a table of one group's rows; times relative to the fastest of ours in the same work and direction."""
    ours: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.provider.startswith("led_kernels"):
            work = (row.what, row.direction)
            ours[work] = min(row.median_ms, ours.get(work, row.median_ms))
    header = (
        "what", "provider", "direction", "median ms", "min ms", "rounds", "TFLOP/s", "time ÷ our best", "error",
    )  # fmt: skip
    lines = []
    for row in rows:
        own = ours.get((row.what, row.direction))
        lines.append((
            row.what, row.provider, row.direction, f"{row.median_ms:.4f}", f"{row.min_ms:.4f}", str(row.repeats),
            f"{row.flop / row.median_ms / 1e9:.2f}" if row.flop else "",
            f"{row.median_ms / own:.2f}" if own else "",
            "" if row.what in YARDSTICKS else f"{row.error:.1e}",
        ))  # fmt: skip
    return table.markdown(header, lines)


def _plan(groups: list[Group]) -> list[str]:
    lines = []
    for group in groups:
        shape = group.shape
        lines.append(
            f"{group.name}: {shape.heads} heads, head_dim {shape.head_dim}, window ±{shape.window}, "
            f"{len(shape.global_index)} global tokens, {shape.dtype}"
        )
        for case in group.cases:
            # ours refuses a machine without a GPU, which the first line says for all
            reason = case.refusal() if torch.cuda.is_available() or not case.is_ours else None
            lines.append(f"  {case.name}" + (f": left out, {reason}" if reason else ""))
    return lines


def _text(command: Sequence[str]) -> str:
    return " ".join(
        "python" if part == sys.executable else f"'{part}'" if " " in part else part for part in command
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.gpu_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would run and what would be left out"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT,
        help=f"Markdown to write, beside it the CSV; default {DEFAULT.name}",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything; default 10")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
