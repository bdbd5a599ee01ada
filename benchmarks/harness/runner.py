"""The runner times every provider beside its peers and writes one row per case to a CSV.

Within a group the providers take turns, one call each per round, and a row holds the median over rounds. A
provider whose rounds would take more than half a minute gets fewer of them, at least three; its row says how
many. Each is checked first (:mod:`benchmarks.harness.verify`): a wrong result of ours ends the run, a peer that
is wrong or cannot do the work is left out. Rows are written to
``OUT.partial`` as they are finished, which becomes ``OUT`` when the run is complete: OUT always holds one
whole run, and an interrupted one keeps its rows until the next starts.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import memory, table, verify
from benchmarks.harness.cases import FORWARD, YARDSTICKS, Call, Case, Group, MemoryCase
from led_kernels.dispatch import missing_kernels

REPEATS = 15  # rounds, unless asked for others
BUDGET = 30.0  # seconds of repeats for one case, beyond the least number of repeats
LEAST_REPEATS = 3
WRITES = 12  # of 256 MiB: about a millisecond on an H100, more on others


def run(groups: Sequence[Group], out: Path, *, only: str, repeats: int, threads: int) -> int:
    """Measures the groups into a new CSV, and returns the exit status of a command that does so.

    Args:
        only: words that the name of a case must hold; an empty text for all cases.
        repeats: rounds.
        threads: of torch.
    """
    if (reason := unnamed_fallback()) is not None:
        print(f"stopped, nothing is timed under another's name: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(threads)
    partial = out.with_suffix(out.suffix + ".partial")
    partial.unlink(missing_ok=True)
    environment = table.environment(threads)
    selected = [_narrow(group, only.split()) for group in groups]
    if not any(group.cases or group.memory for group in selected):
        print(f"--only {only!r} names no case", file=sys.stderr)
        return 2
    try:
        for group in selected:
            if group.cases:
                run_group(group, repeats, partial, environment)
            for case in group.memory:
                measure_memory(group, case, threads, partial, environment)
    except verify.GateError as error:
        print(f"stopped, {error}; rows so far: {partial}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; rows so far: {partial}", file=sys.stderr)
        return 130
    partial.replace(out)
    return 0


def unnamed_fallback() -> str | None:
    """Tells why torch's operations would be timed as led_kernels; None where kernels run or a backend was named."""
    return None if os.environ.get("LED_KERNELS_BACKEND") else missing_kernels("cpu")


def run_group(group: Group, repeats: int, path: Path, environment: dict[str, str | int]) -> dict[Case, str]:
    """Checks the cases, times those that run here, and appends a row for each as its last repeat is done.

    Returns:
        the cases that were left out, and why.
    """
    calls, errors, left_out = _gate(group)
    seconds: dict[Case, list[float]] = {case: [] for case in calls}
    wanted = dict.fromkeys(calls, repeats)
    written = set()

    def write(case: Case) -> None:
        if seconds[case] and case not in written:
            written.add(case)
            row = _row(group, case.what, case.provider, case.direction, environment)
            measured = {**_statistics(seconds[case]), "error": float(f"{errors[case]:.2e}")}
            table.append(path, dataclasses.replace(row, flop=case.flop, bytes=case.bytes, **measured))

    with tqdm(total=repeats * len(calls), desc=f"{group.name}, timing", disable=None) as bar:
        try:
            for turn in range(repeats):
                for case, call in calls.items():
                    if not _is_turn(turn, wanted[case], repeats):
                        continue
                    bar.set_postfix_str(case.name)
                    seconds[case].append(_time(call) if group.shape.device == "cpu" else _time_on_gpu(call))
                    if turn == 0:
                        affordable = max(LEAST_REPEATS, int(BUDGET / seconds[case][0]))
                        wanted[case] = min(repeats, affordable)
                        bar.total -= repeats - wanted[case]
                    bar.update()
                    if len(seconds[case]) == wanted[case]:
                        write(case)
        finally:  # what an interruption cut short is kept, with its number of repeats
            for case in calls:
                write(case)
    return left_out


def measure_memory(
    group: Group, case: MemoryCase, threads: int, path: Path, environment: dict[str, str | int]
) -> None:
    """Appends the row of one provider's peak memory."""
    peak = memory.measure(case, group.shape, threads)
    row = _row(group, "memory", case.provider, FORWARD, environment)
    table.append(path, dataclasses.replace(row, peak_mib=round(peak, 2)))


def _gate(group: Group) -> tuple[dict[Case, Call], dict[Case, float], dict[Case, str]]:
    """Returns the calls that run here, each made once and found right, how far off each was, and the other cases."""
    calls, errors, left_out = {}, {}, {}
    for case in tqdm(group.cases, desc=f"{group.name}, checking", disable=None):
        reason = case.refusal()
        if not reason:
            try:
                call = case.prepare(group.shape)
                result = call()
                errors[case] = verify.check(case.name, result, case.truth(group.shape)) if case.truth else 0.0
                calls[case] = call
            except Exception as error:  # of a peer: wrong, out of memory, not made for this GPU
                if case.is_ours:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason:
            tqdm.write(f"{case.name}: left out, {reason}", file=sys.stderr)
            left_out[case] = reason
    return calls, errors, left_out


def _time(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freeing it is not timed
    return seconds


def _time_on_gpu(call: Call) -> float:
    """Returns the time between two events on the stream.

    The writes before them empty the L2 cache, and take the GPU long enough that the host has queued a call of a few
    kernels before the first of them starts: what is timed is the GPU, unless the host needs more than a millisecond.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WRITES):
        _buffer_beyond_cache().zero_()
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1000


@functools.cache
def _buffer_beyond_cache() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")  # 256 MiB; no GPU's L2 holds as much


def _is_turn(turn: int, wanted: int, repeats: int) -> bool:
    """Tells whether a case has this turn: the first round is everybody's, later ones are spread evenly."""
    return turn == 0 or turn * wanted // repeats > (turn - 1) * wanted // repeats


def _statistics(seconds: list[float]) -> dict[str, float | int]:
    milliseconds = [1000 * s for s in seconds]
    return {
        "median_ms": round(statistics.median(milliseconds), 4),
        "min_ms": round(min(milliseconds), 4),
        "repeats": len(seconds),
    }


def _row(
    group: Group, what: str, provider: str, direction: str, environment: dict[str, str | int]
) -> table.Row:
    shape = group.shape
    return table.Row(
        group=group.name,
        what=what,
        provider=provider,
        direction=direction,
        seqlen=shape.seqlen,
        heads=shape.heads,
        head_dim=shape.head_dim,
        window=shape.window,
        num_globals=len(shape.global_index),
        dtype=shape.dtype,
        **environment,
    )


def _narrow(group: Group, words: list[str]) -> Group:
    """Returns the cases whose name holds all the words, and the yardsticks of a group that has any, for ratios."""

    def is_named(name: str) -> bool:
        return all(word in f"{group.name}, {name}" for word in words)

    named = [case for case in group.cases if is_named(case.name)]
    cases = tuple(case for case in group.cases if named and (case in named or case.what in YARDSTICKS))
    memory = tuple(case for case in group.memory if is_named(case.name))
    return dataclasses.replace(group, cases=cases, memory=memory)
