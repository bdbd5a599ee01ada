"""Peak memory of one encoder forward, or of one generation, above the weights, each provider in a process of its own.

``python -m benchmarks.harness.memory WORK PROVIDER`` builds the model, runs it once on a short input (thread pools and
the libraries' own workspaces come into being), notes the resident set size, lowers the kernel's high-water
mark to it (``5`` written to ``/proc/self/clear_refs``) and runs the real input: the figure is the new
high-water mark minus the noted size. malloc is told to return every freed block of 64 KiB or more at once, so
that memory freed by the short run is not counted as resident and then silently used again. Where there is no
``/proc``, ``ru_maxrss`` stands in for the high-water mark; it also sees the time before the noted size and
can only overstate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.harness.shapes import Shape
from benchmarks.suites import encoder, generation

_PROVIDERS = {"encoder": encoder.PROVIDERS, "generation": generation.PROVIDERS}


def measure(work: str, provider: str, shape: Shape, threads: int) -> float:
    """MiB, from a fresh process; ``work`` is ``encoder`` or ``generation``.

    Raises:
        subprocess.CalledProcessError: when that process fails; it has said why on stderr.
    """
    command = [
        sys.executable, "-m", "benchmarks.harness.memory", work, provider,
        "--shape", json.dumps(dataclasses.asdict(shape)), "--threads", str(threads),
    ]  # fmt: skip
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.split()[-1])


def _peak_mib(build: Callable[[Shape], Callable[..., Tensor]], shape: Shape) -> float:
    call = build(shape)
    call(*encoder.make_arguments(encoder.shortest(shape)))
    before = psutil.Process().memory_info().rss
    _reset_high_water_mark()
    call(*encoder.make_arguments(shape))
    return (_high_water_mark() - before) / 2**20


def _reset_high_water_mark() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the high-water mark cannot be reset here; the figure may be too large", file=sys.stderr)


def _high_water_mark() -> int:
    """In bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory above the weights, in MiB.")
    parser.add_argument("work", choices=list(_PROVIDERS))
    parser.add_argument("provider", help="one that the work has: led_model, transformers, …")
    parser.add_argument(
        "--shape", type=json.loads, default={}, help="fields of benchmarks.harness.shapes.Shape, as JSON"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.shape.items()
    }
    print(_peak_mib(_PROVIDERS[arguments.work][arguments.provider], Shape(**shape)))


if __name__ == "__main__":
    main()
