"""benchmarks.tune as far as it goes without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import tune
from benchmarks.harness.shapes import Shape
from benchmarks.static.fake_driver import captured_launches
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.configs import Row, TileConfig

FAST, SLOW = TileConfig(32, 16, 2, 3), TileConfig(16, 16, 4, 1)


def test_dry_run_lists_what_would_be_timed(capsys):
    assert tune.main(["--dry-run", "--kernel", "banded_dq", "--head-dim", "64"]) == 0
    assert (
        capsys.readouterr().out == f"banded_dq, head_dim 64, bfloat16: {len(tune.candidates())} candidates\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure on this machine's GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_ranking_runs_the_op_under_each_candidate(monkeypatch):
    monkeypatch.delenv("LED_KERNELS_TRITON_CONFIG", raising=False)
    monkeypatch.setattr(tune, "candidates", lambda: [SLOW, FAST])

    def measure(run) -> float:
        assert configs.choose("banded_dq", torch.float32, 64) != FAST  # the other kernels keep theirs
        return 1.0 if configs.choose("banded_forward", torch.float32, 64) == FAST else 2.0

    with captured_launches("sm_80"):
        ranking = tune.rank("banded_forward", Shape(128, heads=1, window=16), 0.0, measure)
    assert ranking == [(1.0, FAST), (2.0, SLOW)]
    assert "LED_KERNELS_TRITON_CONFIG" not in os.environ


def test_printed_row_is_one_of_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    printed = tune.format_row("sm_80", Shape(head_dim=128), 0.1, [(1.0, FAST), (2.0, SLOW)])
    (row,) = eval(printed, {"Row": Row, "TileConfig": TileConfig})
    assert row.targets == ("sm_80",)
    assert (row.bits, row.head_dim, row.dropout, row.config) == (32, 128, True, FAST)
    assert "2.00 x" in row.reason
