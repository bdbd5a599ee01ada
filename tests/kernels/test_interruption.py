"""Ctrl-C during a long kernel is answered soon, not when the kernel has come to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import needs_extension

# Each long call takes half a minute and more; a small one comes first, for the first call of a process imports much.
PROGRAM = """
import json, os, signal, sys, threading, time
import torch
from led_kernels import LongformerMask, banded_attention, ops

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
torch.set_num_threads(int(sys.argv[1]))
n = 2**15

def attend(operator, n, heads):
    every = torch.ones(1, n, dtype=torch.long)
    is_global = operator.startswith("global")
    mask = LongformerMask.from_padding(every, every if is_global else None)
    x, lse = torch.randn(1, n, heads, 64), torch.zeros(1, heads, n)
    tensors = (x, None, x, x, x, x, lse) if operator.endswith("backward") else (x, x, x)
    window = () if is_global else (n, n)
    getattr(ops, operator)(*tensors, *mask.tensors(), None, n, *window, 0.125, 0.0, "cpu")

def interrupt():
    time.sleep(1)
    interrupt.began = time.process_time()
    os.kill(os.getpid(), signal.SIGINT)

seconds = {}
for operator in ("banded_forward", "banded_backward", "global_forward", "global_backward"):
    attend(operator, 8, 1)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        attend(operator, n, 8)
    except KeyboardInterrupt:
        seconds[operator] = time.process_time() - interrupt.began
q = torch.randn(1, 64, 2, 16)
mask = LongformerMask.from_lengths([64], 64)
ours, expected = (banded_attention(q, q, q, mask, window_size=9, backend=name) for name in ("cpu", "reference"))
print(json.dumps({"seconds": seconds, "difference": (ours - expected).abs().max().item()}))
"""


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt(threads: int) -> None:
    """And the next call is right."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["seconds"]) == 4
    assert max(found["seconds"].values()) < 2 * threads  # of the processor, all threads together
    assert found["difference"] < 1e-5
