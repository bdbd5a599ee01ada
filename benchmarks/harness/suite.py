"""A suite is what ``python -m benchmarks SUITE`` times, and what its rows are read for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.cases import Group
from benchmarks.harness.figures import Figure, Run
from benchmarks.harness.table import RESULTS


@dataclass(frozen=True)
class Suite:
    """Holds groups of cases, whose names begin with the suite's.

    Attributes:
        about: one line for the list of suites.
        groups: all groups, at the sizes of the published figures or, for a smoke run, at sizes of a second each.
        figures: what was to be reached and what a run saw; a figure without its rows has seen None.
        floors: lines that compare times with what the machine can do, for a run that has such rows.
    """

    name: str
    about: str
    groups: Callable[[bool], list[Group]]
    figures: Callable[[Run], Iterable[Figure]]
    floors: Callable[[Run], list[str]] = field(default=lambda run: [])

    @property
    def out(self) -> Path:
        """Returns the CSV of a run."""
        return RESULTS / f"{self.name}.csv"
