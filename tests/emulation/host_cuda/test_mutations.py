"""Tests of the tests: faults planted in the kernels must not go unnoticed, under one of the schedules at least."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.emulation.host_cuda.build import build_module
from tests.emulation.host_cuda.mutations import MUTATIONS
from tests.emulation.host_cuda.verdicts import judge


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, str | None]:
    """Returns by mutation: the schedule under which the attention tests fail, and why."""
    folder = tmp_path_factory.mktemp("mutations")
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(lambda mutation: mutation.build(folder), MUTATIONS))
    modules = [(str(file), m.op, m.dtype) for file, m in zip(files, MUTATIONS, strict=True)]
    return dict(zip((m.name for m in MUTATIONS), judge(modules), strict=True))


@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_pass_what_mutants_are_judged_by(op, dtype):
    (verdict,) = judge([(str(build_module()), op, dtype)])
    assert verdict is None


@pytest.mark.parametrize("name", [mutation.name for mutation in MUTATIONS])
def test_planted_fault_is_caught(name, verdicts):
    print(verdicts[name])
    assert verdicts[name] is not None
