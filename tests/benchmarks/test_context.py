"""What a rank sends and keeps of a document that is split over several, counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.harness import table
from benchmarks.suites import context
from benchmarks.suites.context import RANK, RANKS, SMOKE, count_kept, count_sent, one_rank_of

BF16, FP32 = 2, 4  # bytes of a number


@pytest.mark.parametrize("tokens", [512, 1024, 4096])
def test_what_is_sent_does_not_depend_on_the_length(tokens):
    """It is k and v of a window's rows for each neighbor, and a few rows of the global token."""
    width, heads = SMOKE.d_model, SMOKE.heads
    halo = 2 * SMOKE.window * 2 * width * BF16
    token = 3 * width * BF16  # its k, its v, and its hidden state
    # The largest lse; sums of what is weighed, and of the weights.
    merged = heads * FP32 + (width + heads) * FP32
    with one_rank_of(RANKS, RANK):
        forward, backward = count_sent(SMOKE, tokens)
    assert forward == halo + token + merged
    assert backward == halo + token + merged - heads * FP32


def test_what_is_kept_is_the_ranks_share():
    """And for each side copies of the rows of a strip: q of a window, k and v of three."""
    tokens = 16384
    with one_rank_of(RANKS, RANK):
        part = count_kept(SMOKE, tokens)
    whole = count_kept(SMOKE, tokens)
    strips = 2 * (1 + 2 * 3) * SMOKE.window * SMOKE.d_model * FP32
    assert whole / RANKS < part < 1.02 * (whole / RANKS + strips)


def test_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "smoke.csv"
    assert benchmarks.main(["context", "--smoke", "--threads", "1", "--out", str(out)]) == 0
    assert len(table.read(out, context.Row)) == 9
    assert "Made by `python -m benchmarks context`." in capsys.readouterr().out


def test_the_published_run_reaches_its_figures() -> None:
    rows = table.read(context.DEFAULT, context.Row)
    assert [figure.is_met for figure in context.figures(rows)] == [True, True]
