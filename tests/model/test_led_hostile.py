"""Whatever a checkpoint's files say, opening it ends soon, in little memory, and by working or in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.hostile import cases


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_hostile_checkpoints(tmp_path: Path, step: int) -> None:
    pytest.importorskip("tokenizers")
    if sys.platform != "linux":
        pytest.skip("limits on memory are Linux's")
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.hostile", str(tmp_path), str(step)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=1100,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines == [{"tried": len(cases()[::step])}]


def test_the_cases_are_many_and_differ() -> None:
    names = [name for name, _ in cases()]
    assert len(names) == len(set(names)) > 1000
