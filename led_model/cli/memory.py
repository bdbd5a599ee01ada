"""Measures how much memory a piece of work takes above what was held before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

_SAMPLE_SECONDS = 0.002
_STATUS = Path("/proc/self/status")


@contextmanager
def peak_memory(device: str = "cpu") -> Generator[Callable[[], int | None], None, None]:
    """Yields a function that, after the block, gives the bytes of the block's peak above its start.

    On a GPU torch's allocator counts. On the CPU it is the resident memory of the process. Linux keeps its high-water
    mark, which the block's start lowers to what is resident then, for every reader of the mark; elsewhere a thread
    samples it through psutil (``None`` without it). Memory freed before but kept by the allocator would hide a part of
    the peak, so it is best measured in a fresh process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
    elif lower_high_water_mark():
        peak, start = None, _status("VmRSS")
        try:
            yield lambda: peak
        finally:
            peak = _status("VmHWM") - start
    else:
        with _sampled_peak() as sampled:
            yield sampled


def lower_high_water_mark() -> bool:
    """Sets Linux's mark to what is resident, and tells whether there is such a mark and it could be set."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM:" in _STATUS.read_text()
    except OSError:
        return False


def _status(name: str) -> int:
    """Returns one of the sizes that Linux knows of this process, in bytes."""
    (kib,) = (line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(kib) * 1024


@contextmanager
def _sampled_peak() -> Generator[Callable[[], int | None], None, None]:
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
