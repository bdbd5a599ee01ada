"""Whatever a checkpoint, a document, an argument or a call holds: an end soon, in little memory, in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["checkpoints", "documents", "calls"])
@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(None, id="some")]
)
def test_hostile(kind: str, every: int | None) -> None:
    if sys.platform != "linux":
        pytest.skip("limits on memory are Linux's")
    every = every or {"checkpoints": 7, "documents": 2, "calls": 4}[kind]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", kind, "--every", str(every)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert ", 0 faults" in done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 100
