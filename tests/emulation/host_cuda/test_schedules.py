"""The order in which threads run makes no difference to a single bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from led_kernels.testing import (
    AttentionCase,
    assert_matches_reference,
    attention_function,
    run_with_gradients,
)

BASE = AttentionCase(
    batch=1, seqlen=200, heads=1, head_dim=64, window_size=70, globals_per_row=((0, 20, 21, 199),)
)
CASES = {
    "window": BASE,
    "padding": replace(BASE, padding="holes", batch=2, globals_per_row=((0, 20), (5,))),
    "packed": replace(BASE, packed=True, batch=2, head_dim=32, globals_per_row=(tuple(range(70)), (3, 100))),
    "dropout": replace(BASE, dropout_p=0.2),
    "head_dim-128": replace(BASE, head_dim=128),
    "head_dim-80": replace(BASE, head_dim=80),
    "head_dim-256": replace(BASE, head_dim=256, seqlen=100, globals_per_row=((0, 20),)),
}


@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_are_those_of_any_schedule(op, dtype, case, monkeypatch):
    mask = case.mask()
    function, inputs = attention_function(op, case, mask, "cuda"), case.inputs(mask, dtype)
    results = {}
    for schedule in ("greedy", "reversed", "lockstep"):
        monkeypatch.setenv("LED_HOST_CUDA_SCHEDULE", schedule)
        results[schedule] = run_with_gradients(function, inputs)
    expected = results.pop("greedy")
    for schedule, actual in results.items():
        for name, x in actual.items():
            assert torch.equal(x.isnan(), expected[name].isnan())
            assert torch.equal(x.nan_to_num(), expected[name].nan_to_num()), f"{name}, {schedule}"
    assert_matches_reference(op, case, "cuda", dtype=dtype)
