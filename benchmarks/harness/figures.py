"""Figures are ratios within one run, and what they were to reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.harness import table
from benchmarks.harness.cases import FORWARD
from benchmarks.harness.table import Row


@dataclass(frozen=True)
class Figure:
    """Compares ``seen`` with ``reach``, of which it must be at least as much, or at most that if ``is_limit``.

    ``seen`` is None where the run has not seen it.
    """

    name: str
    seqlen: int
    reach: float
    seen: float | None
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


def markdown(figures: Iterable[Figure]) -> str:
    """Returns the README's table of figures."""
    header = ("figure", "tokens", "to reach", "seen", "met")
    return table.markdown(header, (figure.cells() for figure in figures))


class Run:
    """Holds the rows of one CSV, found by what they measure."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def groups(self, suite: str) -> list[str]:
        """Returns the names of a suite's groups, ``SUITE_SEQLEN``, in the order of the rows."""
        return list(dict.fromkeys(row.group for row in self.rows if row.group.startswith(f"{suite}_")))

    def row(self, group: str, what: str, provider: str, direction: str = FORWARD) -> Row | None:
        key = (group, what, provider, direction)
        return next((r for r in self.rows if (r.group, r.what, r.provider, r.direction) == key), None)

    def rate(self, group: str) -> Row | None:
        """Returns the row of ``torch.mm`` that ran interleaved with the group's others."""
        return self.row(group, "mm", "torch.mm")


def seqlen_of(group: str) -> int:
    return int(group.split("_")[1])


def efficiency(row: Row | None, mm: Row | None) -> float | None:
    """Returns FLOP per second as a fraction of ``torch.mm``'s."""
    if row is None or mm is None:
        return None
    return (row.flop / row.median_ms) / (mm.flop / mm.median_ms)


def ratio(numerator: Row | None, denominator: Row | None, column: str = "median_ms") -> float | None:
    if numerator is None or denominator is None:
        return None
    return getattr(numerator, column) / getattr(denominator, column)
