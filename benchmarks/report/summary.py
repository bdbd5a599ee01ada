"""``python -m benchmarks.report.summary``: what was to be reached and what runs saw, computed from their CSVs alone.

``--update-readme`` writes the tables between the README's ``<!-- figures -->`` marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import table
from benchmarks.harness.cases import FORWARD, FORWARD_BACKWARD
from benchmarks.harness.table import Row
from benchmarks.suites.attention import CPU, FLEX
from benchmarks.suites.compiled import COMPILED
from benchmarks.suites.encoder import DROP_IN, OWN, STOCK
from benchmarks.suites.generation import BEAMS, GENERATE, GREEDY

README = Path(__file__).parents[2] / "README.md"
COMMITTED = (table.DEFAULT, table.GENERATION, table.COMPILED)
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


@dataclass(frozen=True)
class Figure:
    """``seen`` must be at least ``reach``, or at most where ``is_limit``."""

    name: str
    seqlen: int
    reach: float
    seen: float
    is_limit: bool = False
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return self.seen <= self.reach if self.is_limit else self.seen >= self.reach

    def cells(self) -> tuple[str, ...]:
        sign = "≤" if self.is_limit else "≥"
        seen = f"{self.seen:.2f}{self.unit}"
        return (
            self.name, f"{self.seqlen:,}", f"{sign} {self.reach:g}{self.unit}", seen, "yes" if self.is_met
            else "no",
        )  # fmt: skip


class Run:
    """The rows of one CSV, found by what they measure."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.groups = list(dict.fromkeys(row.group for row in rows))

    def row(self, group: str, what: str, provider: str, direction: str = FORWARD) -> Row | None:
        key = (group, what, provider, direction)
        return next((r for r in self.rows if (r.group, r.what, r.provider, r.direction) == key), None)

    def rate(self, group: str) -> Row | None:
        """The row of ``torch.mm`` that ran interleaved with the group's others."""
        return self.row(group, "mm", "torch.mm")


def efficiency(row: Row | None, mm: Row | None) -> float | None:
    """FLOP per second as a fraction of ``torch.mm``'s."""
    if row is None or mm is None:
        return None
    return (row.flop / row.median_ms) / (mm.flop / mm.median_ms)


def ratio(numerator: Row | None, denominator: Row | None, column: str = "median_ms") -> float | None:
    if numerator is None or denominator is None:
        return None
    return getattr(numerator, column) / getattr(denominator, column)


def figures(rows: list[Row]) -> list[Figure]:
    """Every figure for which the CSV holds the rows."""
    return [figure for figure in _figures(Run(rows)) if figure.seen is not None]


def _figures(run: Run) -> Iterator[Figure]:
    layers = [group for group in run.groups if group.startswith("attention_")]
    for group in layers:
        seqlen, mm = int(group.split("_")[1]), run.rate(group)
        banded, both = (run.row(group, "banded", CPU, d) for d in (FORWARD, FORWARD_BACKWARD))
        yield Figure("forward, FLOP/s ÷ `torch.mm`'s", seqlen, 0.75, efficiency(banded, mm))
        yield Figure("forward + backward, FLOP/s ÷ `torch.mm`'s", seqlen, 0.60, efficiency(both, mm))
        flex = ratio(run.row(group, "banded", FLEX), banded)
        yield Figure("forward vs `torch.compile(flex_attention)`", seqlen, 1.8, flex, unit=" ×")
        for direction, name, reach in (
            (FORWARD, "forward", 25),
            (FORWARD_BACKWARD, "forward + backward", 15),
        ):
            stock, ours = (run.row(group, "core", provider, direction) for provider in (STOCK, CPU))
            yield Figure(
                f"{name} vs transformers' attention core", seqlen, reach, ratio(stock, ours), unit=" ×"
            )
    if len(layers) == 2:
        shorter, longer = sorted(layers, key=lambda group: int(group.split("_")[1]))
        growth = ratio(run.row(longer, "banded", CPU), run.row(shorter, "banded", CPU))
        name, seqlen = f"forward, time ÷ time at {shorter.split('_')[1]} tokens", int(longer.split("_")[1])
        yield Figure(name, seqlen, 4.2, growth, is_limit=True)
    for group in (group for group in run.groups if group.startswith("generation_")):
        yield from _generation_figures(run, group)
    for group in (group for group in run.groups if group.startswith("compiled_")):
        seqlen, linears = int(group.split("_")[1]), run.row(group, "linears", "torch.nn")
        for provider in (OWN, DROP_IN):
            row, eager = (run.row(group, "encoder", f"{provider}{suffix}") for suffix in (COMPILED, ""))
            yield Figure(f"encoder ({provider}), eager ÷ compiled", seqlen, 1.0, ratio(eager, row), unit=" ×")
            name = f"encoder ({provider}), compiled, time ÷ its linear layers alone"
            yield Figure(name, seqlen, 1.35, ratio(row, linears), is_limit=True)
    for group in (group for group in run.groups if group.startswith("encoder_")):
        seqlen = int(group.split("_")[1])
        stock, linears = run.row(group, "encoder", STOCK), run.row(group, "linears", "torch.nn")
        stock_peak = run.row(group, "memory", STOCK)
        for provider in (OWN, DROP_IN):
            name, encoder = f"encoder ({provider})", run.row(group, "encoder", provider)
            peak = ratio(run.row(group, "memory", provider), stock_peak, "peak_mib")
            yield Figure(
                f"{name}, time ÷ its linear layers alone",
                seqlen,
                1.35,
                ratio(encoder, linears),
                is_limit=True,
            )
            yield Figure(f"{name} vs transformers", seqlen, 3.0, ratio(stock, encoder), unit=" ×")
            yield Figure(f"{name}, peak memory ÷ transformers'", seqlen, 0.25, peak, is_limit=True)


def _generation_figures(run: Run, group: str) -> Iterator[Figure]:
    seqlen, read = int(group.split("_")[1]), run.row(group, "read", "torch.sum")
    for search, reach in ((GREEDY, 1.6), (BEAMS, 7)):
        stock, ours = (run.row(group, search, provider, GENERATE) for provider in (STOCK, OWN))
        yield Figure(f"{search} (led_model) vs transformers", seqlen, reach, ratio(stock, ours), unit=" ×")
    for search in (GREEDY, BEAMS):
        step = ratio(run.row(group, "step", OWN, search), read)
        name = f"{search} (led_model), time of a step ÷ reading its weights and keys"
        yield Figure(name, seqlen, 1.3, step, is_limit=True)
    stock, ours = (run.row(group, "memory", provider) for provider in (STOCK, OWN))
    name = f"{BEAMS} (led_model), peak memory ÷ transformers'"
    yield Figure(name, seqlen, 0.5, ratio(ours, stock, "peak_mib"), is_limit=True)


def markdown(rows: list[Row]) -> str:
    """The table, and a line that says what it was measured on."""
    header = ("figure", "tokens", "to reach", "seen", "met")
    lines = [header, ("---",) * len(header), *(figure.cells() for figure in figures(rows))]
    first = rows[0]
    shape = (
        f"{first.heads} heads, head_dim {first.head_dim}, window ±{first.window}, "
        f"global tokens: {first.num_globals}"
    )
    setting = (
        f"One run of {first.threads} threads on {first.cpu} ({first.isa}), torch {first.torch}, "
        f"transformers {first.transformers}: {first.dtype}, batch 1, {shape}."
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{setting}"


def floors(rows: list[Row]) -> str:
    """For every attention row: what its operations need at mm's rate, its bytes at copy's, and its time; for every
    decoding step: what its bytes need when they are only read."""
    run = Run(rows)
    steps = [row for row in rows if row.what == "step"]
    if steps:
        reading = {row.group: row.median_ms for row in rows if row.what == "read"}
        lines = ["reading a step's bytes, the step (ms, medians)"]
        lines += [f"{row.direction:12}{reading[row.group]:10.2f}{row.median_ms:10.2f}" for row in steps]
        return "\n".join(lines)
    lines = ["operations ÷ torch.mm's rate, bytes ÷ torch.copy's rate, time (ms, medians)"]
    for row in rows:
        mm, copy = run.rate(row.group), run.row(row.group, "copy", "torch.copy")
        if row.what in ("banded", "core") and mm and copy:
            compute, traffic = row.flop * mm.median_ms / mm.flop, row.bytes * copy.median_ms / copy.bytes
            name = f"{row.seqlen} tokens, {row.what}, {row.direction}, {row.provider}"
            lines.append(
                f"{name:62}{compute:10.2f}{traffic:10.2f}{row.median_ms:10.2f}  ({row.repeats} repeats)"
            )
    return "\n".join(lines)


def update_readme(text: str, block: str) -> str:
    """``text`` with ``block`` between its marks.

    Raises:
        ValueError: when the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"README.md does not hold the marks {BEGIN} and {END}; put them where the table belongs."
        )
    return f"{before}{begin}\n{block}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.summary", description=__doc__.splitlines()[0]
    )
    parser.add_argument("csv", type=Path, nargs="*", default=COMMITTED)
    parser.add_argument("--update-readme", action="store_true", help="write the tables into README.md")
    arguments = parser.parse_args(argv)
    for path in arguments.csv:
        if not path.exists():
            command = {table.GENERATION: "generation", table.COMPILED: "compiled"}.get(path, "run")
            print(f"{path} is not there; run python -m benchmarks.{command} first.", file=sys.stderr)
            return 1
    tables = "\n\n".join(markdown(table.read(path)) for path in arguments.csv)
    print(*(floors(table.read(path)) for path in arguments.csv), tables, sep="\n\n")
    if arguments.update_readme:
        README.write_text(update_readme(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
