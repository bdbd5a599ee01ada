"""Each Triton kernel, forward and backward, at a few odd sizes: few enough for compute-sanitizer."""

from __future__ import annotations

import pytest
import torch

from led_kernels.testing import AttentionCase, assert_matches_reference

pytestmark = pytest.mark.gpu

FEW, MANY = ((0, 100, 307), (5,)), (tuple(range(0, 308, 4)), (0, 1))
CASES = {
    "few-globals": AttentionCase(seqlen=308, head_dim=64, window_size=70, globals_per_row=FEW),
    "many-globals": AttentionCase(seqlen=308, head_dim=64, window_size=(20, 3), globals_per_row=MANY),
    "holes": AttentionCase(
        seqlen=131, head_dim=40, window_size=30, globals_per_row=((0,), ()), padding="holes"
    ),
    "packed-dropout": AttentionCase(
        seqlen=200, head_dim=128, window_size=150, globals_per_row=((0, 9), ()), packed=True, dropout_p=0.2
    ),
}


@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(op, dtype, case):
    assert_matches_reference(op, case, "triton", "cuda", dtype)
