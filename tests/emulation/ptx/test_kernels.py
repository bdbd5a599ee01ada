"""Every kernel of the ``triton`` backend as compiled for sm_80, through its launchers, against the fp64 reference.

Padding rows hold NaN, fresh buffers too; the interpreter checks every address, wait and barrier.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from triton.runtime.jit import JITFunction

from led_kernels.testing import AttentionCase, assert_matches_reference
from tests.emulation.ptx.launch import executed_launches

OPS = ("banded", "global")
GLOBALS = ((0, 5, 40), (66,))
SIZES = dict(batch=2, heads=2, head_dim=64)
FEW_GLOBALS = AttentionCase(**SIZES, seqlen=197, window_size=24, globals_per_row=GLOBALS, padding="holes")
MANY_GLOBALS = AttentionCase(  # more than one tile of global tokens
    **SIZES, seqlen=150, window_size=20, globals_per_row=(tuple(range(15, 149)), (1, 2, 3, 77))
)
CASES = {
    "several_tiles": AttentionCase(**SIZES, seqlen=333, window_size=(130, 101), globals_per_row=GLOBALS),
    "packed": AttentionCase(**SIZES, seqlen=143, window_size=(3, 40), globals_per_row=GLOBALS, packed=True),
    "all_padding": AttentionCase(**SIZES, seqlen=67, window_size=-1, globals_per_row=((9,),), padding="all"),
    "left_padding": AttentionCase(
        **SIZES, seqlen=130, window_size=(0, 9), padding="left", globals_per_row=((100,),)
    ),
    "one_token": AttentionCase(**SIZES, seqlen=1, window_size=4),
}
DROPOUT_CASES = {
    "dropout": AttentionCase(**SIZES, seqlen=145, window_size=30, globals_per_row=GLOBALS, dropout_p=0.2),
    "piece": AttentionCase(
        **SIZES,
        seqlen=190,
        window_size=30,
        globals_per_row=((0, 5, 185), (66,)),
        dropout_p=0.3,
        halo=(70, 9),
        position_offset=64,
    ),
    "dropout_packed": AttentionCase(
        **SIZES, seqlen=97, window_size=(7, 50), globals_per_row=GLOBALS, packed=True, dropout_p=0.5
    ),
}
SLOW_CASES = {
    "few_globals": FEW_GLOBALS,
    "many_globals": MANY_GLOBALS,
    "head_dim_40": AttentionCase(
        batch=1, heads=3, head_dim=40, seqlen=77, window_size=17, globals_per_row=((3, 70),), padding="right"
    ),
    "head_dim_128": AttentionCase(
        batch=1,
        heads=2,
        head_dim=128,
        seqlen=161,
        window_size=50,
        globals_per_row=((3, 70),),
        padding="holes",
    ),
}


def run(op: str, case: AttentionCase, dtype: torch.dtype) -> set[str]:
    """Forward and backward within the error bound -> names of the kernels that were executed"""
    with executed_launches() as launches:
        assert_matches_reference(op, case, "triton", dtype=dtype)
    return {launch.name for launch in launches}


def kernels(op: str) -> set[str]:
    """Names of all kernels in an op's modules."""
    modules = [
        importlib.import_module(f"led_kernels.backends.triton.{op}_{way}") for way in ("forward", "backward")
    ]
    return {
        name
        for module in modules
        for name, function in vars(module).items()
        if isinstance(function, JITFunction) and name.endswith("_kernel")
    }


@pytest.mark.parametrize(
    ("op", "cases"), [("banded", (FEW_GLOBALS,)), ("global", (FEW_GLOBALS, MANY_GLOBALS))], ids=OPS
)
def test_every_kernel(op, cases):
    assert set.union(*[run(op, case, torch.bfloat16) for case in cases]) == kernels(op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES)
def test_bf16(op, case):
    assert run(op, CASES[case], torch.bfloat16)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", DROPOUT_CASES)
def test_fp16_with_dropout(op, case):
    assert run(op, DROPOUT_CASES[case], torch.float16)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("case", CASES | DROPOUT_CASES | SLOW_CASES)
def test_every_dtype(op, case, dtype):
    assert run(op, (CASES | DROPOUT_CASES | SLOW_CASES)[case], dtype)
