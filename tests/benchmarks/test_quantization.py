"""The table of smaller weights, on tiny models."""

from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

from benchmarks.__main__ import main
from benchmarks.harness import table
from benchmarks.suites import quantization


def test_smoke_run(tmp_path: Path) -> None:
    path = tmp_path / "quantization.csv"
    assert main(["quantization", "--smoke", "--threads", "1", "--out", str(path)]) == 0
    rows = table.read(path, quantization.Row)
    assert [row.weights for row in rows] == list(quantization.WEIGHTS)
    fp32, bf16, int8, nf4, _ = rows
    assert fp32.logit_error == 0
    assert fp32.top1_agreement == fp32.greedy_agreement == 1
    assert bf16.weights_mib == pytest.approx(fp32.weights_mib / 2)
    assert nf4.layers_mib < int8.layers_mib < bf16.layers_mib < fp32.layers_mib
    assert 0 < int8.logit_error < nf4.logit_error
    assert quantization.markdown(rows).count("\n| ") == len(rows) + 1
