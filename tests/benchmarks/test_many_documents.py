"""The suite of many documents: what it counts and times, and what its published run saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.harness import table
from benchmarks.harness.figures import Run
from benchmarks.suites import documents


def test_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way of reading gives what reading one at a time in fp64 does, and rows are counted as they are padded."""
    out = tmp_path / "smoke.csv"
    assert benchmarks.main(["documents", "--smoke", "--repeats", "2", "--out", str(out)]) == 0
    rows = {row.provider: row for row in table.read(out)}
    assert rows.keys() == documents.PROVIDERS.keys()
    assert all(0 < row.error < 1e-4 for row in rows.values())
    lengths = [len(document.text) + 2 for document in documents.documents(documents.SMOKE)]
    batches = [lengths[begin : begin + 8] for begin in range(0, len(lengths), 8)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    fixed, alone = rows[documents.FILE_ORDER[8]], rows[documents.ALONE]
    assert fixed.flop / alone.flop == pytest.approx(padded / sum(lengths))
    assert "documents: rows computed ÷ real" in capsys.readouterr().out


def test_the_published_run_reaches_its_figures() -> None:
    figures = list(documents.figures(Run(table.read(documents.SUITE.out))))
    assert [figure.is_met for figure in figures] == [True, True]


def test_the_readme_says_what_the_published_run_saw() -> None:
    rows = {row.provider: row for row in table.read(documents.SUITE.out)}
    own, alone, fixed = rows[documents.OWN], rows[documents.ALONE], rows[documents.FILE_ORDER[8]]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told = " ".join(readme.split())
    assert f"lengths {own.flop / alone.flop:.2f} rows are computed for each real one" in told
    assert f"and {fixed.flop / alone.flop:.1f} in batches of 8 in file order" in told
    assert f"reading is {fixed.median_ms / own.median_ms:.1f} × as fast as these" in told
    assert f"and {alone.median_ms / own.median_ms:.1f} × as fast as one document at a time" in told
