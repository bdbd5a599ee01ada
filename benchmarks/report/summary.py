"""``python -m benchmarks.report.summary`` tells what was to be reached and what runs saw, from their CSVs alone.

``--update-readme`` writes the tables between the README's marks: ``<!-- figures -->``, and a pair of marks for each of
:data:`UNTIMED`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import runner, table
from benchmarks.harness.figures import Figure, Run
from benchmarks.harness.figures import markdown as figures_markdown
from benchmarks.harness.table import Row
from benchmarks.suites import context, learning, memory, quantization
from benchmarks.suites.catalog import COMMITTED, SUITES, TOGETHER

README = Path(__file__).parents[2] / "README.md"
FIGURES = "figures"  # the name of the marks around the timed suites' tables
# Suites that are not timed, whose tables have marks of their names.
UNTIMED = {"quantization": quantization, "learning": learning, "memory": memory, "context": context}


def figures(rows: list[Row]) -> list[Figure]:
    """Returns every figure for which the CSV holds the rows."""
    run = Run(rows)
    found = (figure for suite in SUITES.values() for figure in suite.figures(run))
    return [figure for figure in found if figure.seen is not None]


def markdown(rows: list[Row]) -> str:
    """Returns the table, and a line that says what it was measured on."""
    first = rows[0]
    shape = (
        f"{first.heads} heads, head_dim {first.head_dim}, window ±{first.window}, "
        f"global tokens: {first.num_globals}"
    )
    setting = (
        f"One run of {first.threads} threads on {first.cpu} ({first.isa}), torch {first.torch}, "
        f"transformers {first.transformers}: {first.dtype}, batch 1, {shape}."
    )
    return f"{figures_markdown(figures(rows))}\n\n{setting}"


def floors(rows: list[Row]) -> str:
    """Returns times beside what the machine can do at best, where the CSV holds rows that tell; or nothing."""
    run = Run(rows)
    return "\n\n".join("\n".join(lines) for suite in SUITES.values() if (lines := suite.floors(run)))


def report(rows: list[Row]) -> str:
    """Returns all that there is to say of one run."""
    return "\n\n".join(filter(None, [floors(rows), markdown(rows)]))


def command(rows: list[Row]) -> str:
    """Returns what one types for such a run."""
    suites = list(dict.fromkeys(row.group.split("_")[0] for row in rows))
    named = "" if suites == [suite.name for suite in TOGETHER] else f" {suites[0]}"
    rounds = max(row.repeats for row in rows)
    repeats = f" --repeats {rounds}" if rounds != runner.REPEATS else ""
    return f"python -m benchmarks{named} --threads {rows[0].threads}{repeats}"


def readme_block(paths: Sequence[Path]) -> str:
    """Returns the README's tables, each with the command that made it."""
    runs = [table.read(path) for path in paths]
    return "\n\n".join(f"{markdown(rows)}\n\nMade by `{command(rows)}`." for rows in runs)


def marks(name: str) -> tuple[str, str]:
    """Returns the lines of the README between which the tables of that name stand."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def update_readme(text: str, block: str, name: str = FIGURES) -> str:
    """Returns ``text`` with ``block`` between the marks of that name.

    Raises:
        ValueError: when the marks are not there.
    """
    begin, end = marks(name)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(
            f"README.md does not hold the marks {begin} and {end}; put them where the table belongs."
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
            named = f" {path.stem}" if path.stem in SUITES else ""
            print(f"{path} is not there; run python -m benchmarks{named} first.", file=sys.stderr)
            return 1
    print(*(report(table.read(path)) for path in arguments.csv), sep="\n\n")
    if arguments.update_readme:
        text = update_readme(README.read_text(encoding="utf-8"), readme_block(arguments.csv))
        for name, suite in UNTIMED.items():
            text = update_readme(text, suite.markdown(table.read(suite.DEFAULT, suite.Row)), name)
        README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
