"""``python -m benchmarks.run``: times every provider beside its peers and writes one row per case to a CSV.

Within a group the providers take turns, one call each per round, and a row holds the median over rounds. A
provider whose rounds would take more than half a minute gets fewer of them, at least three; its row says how
many. Each is checked first (:mod:`benchmarks.verify`), and a wrong result ends the run. Rows are written to
``OUT.partial`` as they are finished, which becomes ``OUT`` when the run is complete: OUT always holds one
whole run, and an interrupted one keeps its rows until the next starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import memory, summary, table, verify
from benchmarks.registry import FORWARD, YARDSTICKS, Call, Case, Group, groups

BUDGET = 30.0  # seconds of repeats for one case, beyond the least number of repeats
LEAST_REPEATS = 3


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    partial = arguments.out.with_suffix(arguments.out.suffix + ".partial")
    partial.unlink(missing_ok=True)
    environment = table.environment(arguments.threads)
    selected = [_narrow(group, arguments.only.split()) for group in groups(arguments.smoke)]
    if not any(group.cases or group.memory for group in selected):
        print(f"--only {arguments.only!r} names no case", file=sys.stderr)
        return 2
    try:
        for group in selected:
            if group.cases:
                run_group(group, arguments.repeats, partial, environment)
            for provider in group.memory:
                measure_memory(group, provider, arguments.threads, partial, environment)
    except verify.GateError as error:
        print(f"stopped, {error}; rows so far: {partial}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; rows so far: {partial}", file=sys.stderr)
        return 130
    partial.replace(arguments.out)
    rows = table.read(arguments.out)
    print(summary.floors(rows), summary.markdown(rows), sep="\n\n")
    if arguments.smoke:
        print("\nThese are tiny shapes: that the run is complete is all that they show.")
    return 0


def run_group(group: Group, repeats: int, path: Path, environment: dict[str, str | int]) -> None:
    """Checks the cases, times those that run here, and appends a row for each as its last repeat is done."""
    calls, errors = _gate(group)
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
                    seconds[case].append(_time(call))
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


def measure_memory(
    group: Group, provider: str, threads: int, path: Path, environment: dict[str, str | int]
) -> None:
    """Appends the row of one encoder's peak memory."""
    peak = memory.measure(provider, group.shape, threads)
    row = _row(group, "memory", provider, FORWARD, environment)
    table.append(path, dataclasses.replace(row, peak_mib=round(peak, 2)))


def _gate(group: Group) -> tuple[dict[Case, Call], dict[Case, float]]:
    """The calls of the cases that run here, each made once and found right, and how far off it was."""
    calls, errors = {}, {}
    for case in tqdm(group.cases, desc=f"{group.name}, checking", disable=None):
        reason = case.refusal()
        if reason:
            tqdm.write(f"{case.name}: left out, {reason}", file=sys.stderr)
            continue
        calls[case] = case.prepare(group.shape)
        result, truth = calls[case](), verify.truth_of(case.what, group.shape)
        errors[case] = verify.check(case.name, result, truth) if truth else 0.0
    return calls, errors


def _time(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freeing it is not timed
    return seconds


def _is_turn(turn: int, wanted: int, repeats: int) -> bool:
    """The first round is everybody's; later ones are spread evenly."""
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
        **environment,
    )


def _narrow(group: Group, words: list[str]) -> Group:
    """The cases whose name holds all the words, and the yardsticks of a group that has any, for ratios."""

    def is_named(name: str) -> bool:
        return all(word in f"{group.name}, {name}" for word in words)

    named = [case for case in group.cases if is_named(case.name)]
    cases = tuple(case for case in group.cases if named and (case in named or case.what in YARDSTICKS))
    memory = tuple(provider for provider in group.memory if is_named(f"memory, {provider}"))
    return dataclasses.replace(group, cases=cases, memory=memory)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, seconds in all; figures mean nothing"
    )
    parser.add_argument(
        "--only", default="", help="cases whose name holds all these words, as in 'banded cpu'"
    )
    parser.add_argument("--out", type=Path, help=f"CSV to write; default {table.DEFAULT.name} (smoke.csv)")
    parser.add_argument("--repeats", type=int, help="rounds; default 15 (smoke 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or (table.RESULTS / "smoke.csv" if arguments.smoke else table.DEFAULT)
    arguments.repeats = arguments.repeats or (3 if arguments.smoke else 15)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
