"""Peak memory of one call is measured here above what is held before it, each provider in a process of its own.

The process builds the provider and calls it once on a short input (thread pools and the libraries' own workspaces come
into being); the figure is the peak of the real call above that. malloc is told to return every freed block of 64 KiB or
more at once, so that memory freed by the short call is not counted as resident and then silently used again. Where
Linux's high-water mark cannot be lowered the memory is sampled, and a short peak may be missed; a line says so.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from benchmarks.harness.cases import MemoryCase
from benchmarks.harness.shapes import Shape
from led_model.cli.memory import lower_high_water_mark, peak_memory

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(case: MemoryCase, shape: Shape, threads: int) -> float:
    """Measures MiB in a fresh process."""
    context = multiprocessing.get_context("spawn")
    # the new process reads malloc's settings when it starts, which is at the submission
    with mock.patch.dict(os.environ, MALLOC), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_mib, case, shape, threads).result()


def _peak_mib(case: MemoryCase, shape: Shape, threads: int) -> float:
    torch.set_num_threads(threads)
    warm_up, call = case.prepare(shape)
    warm_up()
    if not lower_high_water_mark():
        print("memory is sampled here, peaks may be higher than the figures", file=sys.stderr)
    with peak_memory() as peak:
        call()
    return peak() / 2**20
