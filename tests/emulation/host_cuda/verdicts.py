"""The attention tests judge modules with planted faults: ``python -m tests.emulation.host_cuda.verdicts``.

Reads a JSON list of [file of a module, op, dtype] and writes a JSON list: the first schedule under which the tests
fail, and why; null where they pass under all. A module that crashes or hangs takes only its own process along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys

import torch

from led_kernels.testing import AttentionCase, assert_matches_reference
from tests.emulation.host_cuda.build import ROOT

SCHEDULES = ("greedy", "reversed", "lockstep")
_SECONDS = 60
_CASES = (
    # tiles with padding and interior tiles; global tokens inside and outside of the bands
    AttentionCase(
        1, 300, 1, head_dim=64, window_size=(250, 200), padding="left", globals_per_row=((110, 120, 290),)
    ),
    # so many global tokens that a split of the keys has several tiles; sequences that end elsewhere in a tile
    AttentionCase(
        2,
        300,
        1,
        head_dim=64,
        window_size=(60, 70),
        packed=True,
        globals_per_row=(tuple(range(3, 300, 4)), (5,)),
    ),
)


def judge(modules: list[tuple[str, str, str]]) -> list[str | None]:
    """Judges in a process of its own, since modules of one name cannot live in one."""
    command = [sys.executable, "-m", __name__]
    result = subprocess.run(
        command, input=json.dumps(modules), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return json.loads(result.stdout)


def _verdict(file: str, op: str, dtype: str, schedule: str) -> str | None:
    os.environ["LED_HOST_CUDA_SCHEDULE"] = schedule
    spec = importlib.util.spec_from_file_location("led_kernels._C", file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    for case in _CASES:
        try:
            assert_matches_reference(op, case, "cuda", dtype=getattr(torch, dtype))
        except (AssertionError, RuntimeError) as error:
            return str(error)
    return None


def _in_child(*args: str) -> str | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(_SECONDS)
        try:
            os.write(writer, json.dumps(_verdict(*args)).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        written = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status > 0:
        raise RuntimeError(f"the tests of {args} could not run")
    return json.loads(written)


def _first_failure(*module: str) -> str | None:
    for schedule in SCHEDULES:
        if failure := _in_child(*module, schedule):
            return f"{schedule}: {failure}"
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([_first_failure(*module) for module in json.load(sys.stdin)]))
