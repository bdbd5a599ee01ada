"""Whatever a checkpoint, a document, an argument or a call holds: an end soon, in little memory, in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "every", "least"),
    [
        ("checkpoints", 7, 300),
        ("documents", 3, 200),
        ("outputs", 1, 15),
        ("calls", 4, 500),
        pytest.param("checkpoints", 1, 1900, marks=pytest.mark.slow),
        pytest.param("documents", 1, 600, marks=pytest.mark.slow),
        pytest.param("calls", 1, 2000, marks=pytest.mark.slow),
    ],
)
def test_hostile(kind: str, every: int, least: int) -> None:
    if sys.platform != "linux":
        pytest.skip("limits on memory are Linux's")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", kind, "--every", str(every)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    count, faults = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert count >= least
    assert faults == 0
