"""The kernels of the ``cuda`` backend as nvcc compiles them for sm_80, against the fp64 reference.

Padding rows hold NaN, fresh buffers too; the interpreter checks every address, wait and barrier.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from led_kernels.backends import BACKENDS
from led_kernels.testing import (
    AttentionCase,
    assert_matches_reference,
    assert_within_error_bound,
    attention_function,
)
from tests.emulation.ptx.cuda_backend import InterpretedCuda
from tests.emulation.ptx.faults import PtxFault
from tests.emulation.ptx.mutations import Mutation, mutations, spread
from tests.emulation.ptx.nvcc import nvcc_path

pytestmark = pytest.mark.skipif(nvcc_path() is None, reason="there is no nvcc in CUDA_HOME or on PATH")

SIZES = dict(batch=1, heads=1, head_dim=64, seqlen=197)
CASES = {
    "holes": AttentionCase(**SIZES, window_size=40, padding="holes", globals_per_row=((0, 5, 77, 190),)),
    "packed_dropout": AttentionCase(
        **(SIZES | dict(batch=2)),
        window_size=(60, 30),
        globals_per_row=((2,), ()),
        packed=True,
        dropout_p=0.2,
    ),
    "piece": AttentionCase(
        **SIZES,
        window_size=40,
        globals_per_row=((0, 77, 190),),
        dropout_p=0.3,
        halo=(70, 9),
        position_offset=64,
    ),
    # interior tiles; more global tokens than one warp's rows hold
    "many_globals": AttentionCase(
        **(SIZES | dict(heads=2, head_dim=32, seqlen=333)),
        window_size=(100, 130),
        globals_per_row=(tuple(range(40, 66)),),
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD = {
    "banded": ["banded_forward_kernel"],
    "global": ["global_forward_kernel", "global_merge_kernel"],
}
BACKWARD = {
    "banded": [
        "banded_dq_kernel", "banded_dkdv_kernel", "banded_dkdv_globals_kernel", "banded_sum_splits_kernel",
    ],
    "global": ["global_dq_kernel", "global_sum_splits_kernel", "global_dkdv_kernel"],
}  # fmt: skip


@contextmanager
def backend_of(cuda: InterpretedCuda) -> Iterator[None]:
    """It is the ``cuda`` backend, on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "led_kernels.backends.cuda", cuda)
        patch.setitem(BACKENDS, "cuda", replace(BACKENDS["cuda"], why_not=lambda device, dtype: None))
        yield


def check_forward(op: str, case: AttentionCase, dtype: torch.dtype, cuda: InterpretedCuda) -> None:
    """out and lse within the error bound."""
    mask = case.mask()
    inputs = case.inputs(mask, dtype)

    def run(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return attention_function(op, case, mask, backend)(*[x.to(dtype) for x in inputs])

    with backend_of(cuda):
        actual = run("cuda", dtype)
    oracle, plain = run("reference", torch.float64), run("reference", dtype)
    for name, *results in zip(("out", "lse"), actual, oracle, plain, strict=True):
        assert_within_error_bound(*results, name)


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize(("case", "dtype"), [("holes", "bf16"), ("packed_dropout", "fp16")])
def test_forward(op, case, dtype):
    cuda = InterpretedCuda()
    check_forward(op, CASES[case], DTYPES[dtype], cuda)
    assert [kernel.name for kernel in cuda.launched] == FORWARD[op]


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize(("case", "dtype"), [("many_globals", "bf16"), ("packed_dropout", "fp16")])
def test_backward(op, case, dtype):
    """And forward."""
    cuda = InterpretedCuda()
    with backend_of(cuda):
        assert_matches_reference(op, replace(CASES[case], head_dim=32), "cuda", dtype=DTYPES[dtype])
    assert [kernel.name for kernel in cuda.launched] == FORWARD[op] + BACKWARD[op]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_every_dtype(op, case, dtype, head_dim):
    with backend_of(InterpretedCuda()):
        assert_matches_reference(op, replace(CASES[case], head_dim=head_dim), "cuda", dtype=DTYPES[dtype])


@pytest.mark.parametrize("kind", ["compare", "wait", "operator", "shared address", "barrier"])
@pytest.mark.parametrize("op", FORWARD)
def test_planted_faults_are_caught(op, kind):
    """Half of them: some mutants are the same program in effect, as in test_mutations."""
    case, dtype, original = CASES["many_globals"], torch.bfloat16, InterpretedCuda()
    check_forward(op, case, dtype, original)
    kernel = original.launched[0]

    def is_caught(mutation: Mutation) -> bool:
        mutant = InterpretedCuda(lambda name, ptx: mutation.apply(ptx) if name == kernel.name else ptx)
        try:
            check_forward(op, case, dtype, mutant)
        except (PtxFault, AssertionError):
            return True
        return False

    planted = spread(mutations(kernel.ptx, kind), count=4)
    survivors = [mutation for mutation in planted if not is_caught(mutation)]
    print(f"{kernel.name}, {kind}: {len(survivors)} of {len(planted)} survive", *survivors, sep="\n  ")
    assert planted
    assert len(survivors) <= len(planted) / 2
