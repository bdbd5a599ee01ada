"""Other programs check these for the report of a GPU: the tests on the GPU, and compute-sanitizer on a few."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "--gpu", "-v", "--tb=short", "-p", "no:cacheprovider")
SELECTION = ("-m", "gpu and not slow")
TESTS = (
    *PYTEST,
    *SELECTION,
    "tests/gpu",
    "tests/kernels/test_attention.py",
    "tests/kernels/test_ops.py",
    "tests/kernels/test_properties.py",
)
# forward and backward of every kernel, at sizes that a slow-down by a hundred leaves bearable
SANITIZED = "tests/gpu/test_every_kernel.py"
TOOLS = ("memcheck", "racecheck")
GRACE = 30.0  # seconds from the interrupt on, for pytest to print its summary

_SELECTED = re.compile(r"\bcollected (\d+) items?(?:.* (\d+) selected)?")
_RESULT = re.compile(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_WORTH_KEEPING = re.compile(
    r"^(FAILED|ERROR|SKIPPED|=+ .*(passed|failed|error|ran|skipped|deselected).* =+$)"
)
_MOST_LINES = 200


@dataclass(frozen=True)
class Outcome:
    """Tells whether a check passed, and what the report says about it."""

    is_good: bool
    text: str


def sanitized_tests(backend: str) -> tuple[str, ...]:
    """Returns the command of the short selection for one backend's kernels."""
    return *PYTEST, *SELECTION, "-k", backend, SANITIZED


def sanitizer_command(tool: str, backend: str) -> tuple[str, ...] | None:
    """Returns the command of compute-sanitizer's tool on :func:`sanitized_tests`, None where it is not installed."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(os.path.join(root, "bin") for root in roots if root)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    return program and (program, "--tool", tool, "--target-processes", "all", *sanitized_tests(backend))


def run_sanitizer(tool: str, command: Sequence[str], limit: float) -> Outcome:
    """Runs a tool, which must find nothing, on tests, which must pass; torch allocates each tensor by itself for it."""
    outcome, lines = run_pytest(command, limit, tool, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    summary = [line for line in lines if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    is_clean = bool(summary) and all(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in summary)
    found = [line for line in lines if line.startswith("=========")]
    return Outcome(
        outcome.is_good and is_clean, f"{outcome.text}\n{_block(found if not is_clean else summary)}"
    )


def run_pytest(
    command: Sequence[str], limit: float, title: str = "tests", environment: dict[str, str] | None = None
) -> tuple[Outcome, list[str]]:
    """Runs tests for at most ``limit`` seconds, then interrupts them: what had run by then counts, and is reported.

    Returns:
        the outcome, and every line of output.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stops = [
        threading.Timer(limit, process.send_signal, [signal.SIGINT]),
        threading.Timer(limit + GRACE, process.kill),
    ]
    counts: Counter[str] = Counter()
    selected, lines = 0, []
    try:
        for stop in stops:
            stop.start()
        with tqdm(desc=title, unit=" tests", disable=None) as bar:
            for line in process.stdout:
                lines.append(line.rstrip())
                if found := _SELECTED.search(line):
                    bar.total = selected = int(found[2] or found[1])
                if found := _RESULT.match(line):
                    counts[found[1].lower()] += 1
                    bar.update()
        status = process.wait()
    finally:
        is_stopped = not stops[0].is_alive()
        for stop in stops:
            stop.cancel()
        if process.poll() is None:
            process.kill()
    is_good = counts["passed"] > 0 and not counts["failed"] + counts["error"] and (status == 0 or is_stopped)
    parts = [f"{count} {result}" for result, count in counts.items()] or ["no test ran"]
    text = f"{', '.join(parts)} of {selected} selected; exit status {status}."
    if is_stopped:
        text += f" Stopped after the {limit:.0f} s that it is given."
    kept = [line for line in lines if _WORTH_KEEPING.match(line)]
    return Outcome(
        is_good, f"{text}\n{_block(kept if is_good else [*kept, '', *lines[-_MOST_LINES:]])}"
    ), lines


def _block(lines: list[str]) -> str:
    if not lines:
        return ""
    cut = [f"… {len(lines) - _MOST_LINES} lines before these"] if len(lines) > _MOST_LINES else []
    return "\n".join(["", "```text", *cut, *lines[-_MOST_LINES:], "```"])
