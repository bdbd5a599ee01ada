"""Measures how much memory a piece of work takes above what was held before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_SAMPLE_SECONDS = 0.002


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[Callable[[], int | None]]:
    """Yields a function that, after the block, gives the bytes of the block's peak above its start.

    On a GPU torch's allocator counts. On the CPU a thread samples the resident memory of the process through
    psutil (``None`` without it); memory freed before but kept by the allocator would hide a part of the peak,
    so it is best measured in a fresh process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
        return
    try:
        import psutil
    except ImportError:
        yield lambda: None
        return
    process = psutil.Process()
    start = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: peak - start
    finally:
        done.set()
        sampler.join()
