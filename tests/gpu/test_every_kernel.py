"""Each kernel, forward and backward, at a few odd sizes: few enough for compute-sanitizer.

The cases differ in what the CUDA kernels are chosen by: head_dim (tensor cores have 32, 64 and 128), alignment, at most
16 global tokens or more, dropout, and keys and queries in one split or several.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from led_kernels.testing import AttentionCase, assert_matches_reference, unaligned
from tests.kernels.pieces import CUT_CASES, assert_pieces_match_whole

pytestmark = pytest.mark.gpu


class UnalignedCase(AttentionCase):
    """q, k and v as :func:`unaligned` makes them."""

    def inputs(self, *args, **settings) -> tuple[Tensor, ...]:
        return tuple(unaligned(x) for x in super().inputs(*args, **settings))


CASES = {
    "few-globals": AttentionCase(
        seqlen=600, head_dim=64, window_size=70, globals_per_row=((0, 100, 599), (5,))
    ),
    "many-globals": AttentionCase(
        seqlen=308, head_dim=32, window_size=(20, 3), globals_per_row=(tuple(range(0, 308, 4)), (0, 1))
    ),
    "holes": AttentionCase(
        seqlen=131, head_dim=160, window_size=30, globals_per_row=((0,), ()), padding="holes"
    ),
    "packed-dropout": AttentionCase(
        seqlen=200,
        head_dim=128,
        window_size=150,
        globals_per_row=(tuple(range(0, 200, 10)), (5,)),
        packed=True,
        dropout_p=0.2,
    ),
    "piece": AttentionCase(
        seqlen=300,
        head_dim=64,
        window_size=30,
        globals_per_row=((0, 290), (150,)),
        dropout_p=0.3,
        halo=(150, 100),
        position_offset=1000,
    ),
    "unaligned": UnalignedCase(
        seqlen=131, head_dim=64, window_size=30, globals_per_row=((0, 9), (130,)), padding="left"
    ),
}

# dropout where the other cases of a head_dim have none, few global tokens where they have many, and the reverse
CASES_OF_CUDA = {
    "few-globals-dropout": AttentionCase(
        seqlen=131, head_dim=32, window_size=30, globals_per_row=((0, 9), (130,)), dropout_p=0.2
    ),
    "many-globals-dropout": AttentionCase(
        seqlen=131,
        head_dim=64,
        window_size=30,
        globals_per_row=(tuple(range(0, 131, 5)), (3,)),
        dropout_p=0.2,
    ),
    "few-globals": AttentionCase(
        seqlen=131, head_dim=128, window_size=30, globals_per_row=((0, 9), (130,)), padding="right"
    ),
}


@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(op, dtype, case, backend):
    assert_matches_reference(op, case, backend, "cuda", dtype)


@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CUT_CASES.values(), ids=CUT_CASES.keys())
def test_pieces_match_the_whole(op, dtype, case, backend):
    assert_pieces_match_whole(op, case, backend, "cuda", dtype)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("op", ["banded", "global"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES_OF_CUDA.values(), ids=CASES_OF_CUDA.keys())
def test_kernels_that_are_compiled_apart(op, dtype, case, backend):
    """What Triton compiles when it is asked for is an object of its own here for each head_dim and element type."""
    assert_matches_reference(op, case, backend, "cuda", dtype)
