"""The shipped configurations, compiled through the real launchers for GPUs that need not be here.

Here a short list; ``pytest -m slow tests/emulation/aot`` compiles everything that is shipped, on every target.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.harness import table
from benchmarks.static import sass
from benchmarks.static.cases import everything, short_list
from benchmarks.static.fake_driver import compilation_keys
from benchmarks.static.table import DEFAULT, Row, violations
from benchmarks.static.triton_kernels import compare, compile_rows
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask

pytestmark = pytest.mark.timeout(900)  # the first test waits for all compilations

# for bf16, head_dim 64, window 512, one global token: kernel, target, column, sign, what to reach
FIGURES = [
    ("_banded_forward_kernel", "sm_80", "interior", "<=", 4.8),
    ("_banded_forward_kernel", "sm_80", "masked", "<=", 7.0),
    ("_banded_forward_kernel", "sm_80", "instructions", "<=", 3200),
    ("_banded_forward_kernel", "sm_80", "query_rows", ">=", 128),
    ("_banded_dkdv_kernel", "sm_80", "interior", "<=", 5.0),
    ("_banded_dq_kernel", "sm_80", "interior", "<=", 5.5),
    ("_banded_forward_kernel", "sm_90", "interior", "<=", 3.9),
    ("_banded_forward_kernel", "sm_90", "query_rows", ">=", 128),
]


@pytest.fixture(scope="session")
def compiled():
    """Rows and failures of the short list."""
    return compile_rows(short_list(), os.cpu_count())


@pytest.fixture(scope="session")
def rows(compiled):
    return compiled[0]


def test_everything_compiles(compiled):
    rows, failed = compiled
    assert failed == []
    assert {row.kernel for row in rows} >= set(sass.PRODUCTS)


def test_no_stack_no_spills_and_shared_memory_within_the_target(rows):
    assert [problem for row in rows for problem in violations(row)] == []


def test_products_run_on_tensor_cores(rows):
    expected = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA", "HMMA"}}
    for row in rows:
        used = set(row.tensor.split()[::2])
        if row.kernel in sass.PRODUCTS and row.dtype != "float32":
            assert used, str(row)
            assert used <= expected[row.target], str(row)


def test_the_forward_uses_only_warpgroup_products_on_hopper(rows):
    found = [row for row in rows if row.op == "banded_forward" and row.target == "sm_90"]
    assert len(found) == 3
    for row in found:
        assert row.tensor.split()[::2] == ["HGMMA"], str(row)


@pytest.mark.parametrize(("kernel", "arch", "column", "sign", "reach"), FIGURES)
def test_figures(rows, kernel, arch, column, sign, reach):
    (row,) = (
        row for row in rows if (row.kernel, *row.key[2:]) == (kernel, arch, "bfloat16", 64, False, False, 1)
    )
    seen = getattr(row, column)
    assert seen is not None, row.note
    assert seen <= reach if sign == "<=" else seen >= reach, (
        f"{row}: {column} {seen}, to reach: {sign} {reach}"
    )


def test_no_figure_is_worse_than_the_committed_one(rows):
    """Only with the Triton that the table was made with: another's machine code is another's."""
    committed = table.read(DEFAULT, Row)
    problems = compare(rows, committed)
    if {row.triton for row in committed} != {triton.__version__}:
        assert len(problems) == 1
        assert "the table is of Triton" in problems[0]
    else:
        assert problems == []


@pytest.mark.slow
@pytest.mark.timeout(12 * 3600)
def test_everything_shipped():
    rows, failed = compile_rows(everything(), os.cpu_count())
    problems = failed + [problem for row in rows for problem in violations(row)]
    assert problems + compare(rows, table.read(DEFAULT, Row)) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.8.0"])
def test_short_list_with_an_older_triton(version, tmp_path):
    """All of this folder's tests but those of figures, which are the newest Triton's. Needs a package index."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, f"triton=={version}"], check=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "not figure", str(Path(__file__).parent)]
    subprocess.run(tests, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)


CALLS = [  # batch, seqlen, window, global tokens
    (1, 16384, (512, 512), 1), (1, 16383, (512, 512), 1), (2, 4096, (512, 512), 1), (3, 4095, (512, 512), 2),
    (4, 1024, (256, 256), 16), (1, 1000, (100, 100), 3), (1, 1, (1, 1), 1), (1, 17, (16, 16), 1),
    (8, 512, (1, 0), 8), (2, 8192, (512, 0), 4), (1, 2048, (0, 128), 15), (1, 2049, (2048, 2048), 1),
    (16, 256, (32, 32), 2), (1, 4096, (512, 512), 0), (5, 333, (7, 9), 0), (1, 64, (64, 64), 5),
    (2, 128, (16, 1), 12), (1, 16384, (256, 256), 7), (32, 48, (24, 24), 1), (1, 2000, (3, 3), 150),
]  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_few_compilations_serve_all_calls(dropout_p):
    from led_kernels.backends import triton as backend

    seed = torch.zeros((), dtype=torch.int64) if dropout_p else None
    with compilation_keys("sm_80") as keys:
        for batch, seqlen, window, num_globals in CALLS:
            index = torch.arange(num_globals).expand(batch, -1)
            mask = LongformerMask.from_lengths(torch.full((batch,), seqlen), seqlen, global_index=index)
            q, k, v = torch.zeros(batch, seqlen, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
            out, lse = torch.empty(q.shape, dtype=q.dtype), torch.zeros(batch, 2, seqlen)
            call = AttentionCall(q, k, v, mask, window, 0.125, dropout_p, seed)
            backend.forward(call)
            backend.backward(call, out, lse, out, None)
            if num_globals:
                q_global, out = (x[:, :num_globals].contiguous() for x in (q, out))
                call = AttentionCall(q_global, k, v, mask, None, 0.125, dropout_p, seed)
                backend.forward(call)
                backend.backward(call, out, torch.zeros(batch, 2, num_globals), out, None)
    assert len(CALLS) == 20
    assert {name.rpartition(".")[2] for name in keys} >= set(sass.PRODUCTS)
    assert {name: len(found) for name, found in keys.items() if len(found) > 4} == {}
