"""Every CUDA kernel, forward and backward, against the fp64 reference.

What a value of one parameter is tried with (dtype, head_dim) takes turns, so that the group stays short; the drawn
cases mix all, and ``-m slow`` runs a larger grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from led_kernels.api import banded_attention, global_attention
from led_kernels.testing import (
    AttentionCase,
    assert_matches_reference,
    assert_within_error_bound,
    unaligned,
)
from tests.kernels.kernel_cases import (
    DTYPES,
    GLOBALS,
    HALO_CASES,
    OPS,
    PADDINGS,
    WINDOWS,
    at_seqlen,
    in_turns,
    name_of,
)
from tests.kernels.pieces import CUT_CASES, assert_far_halo_is_not_read, assert_pieces_match_whole
from tests.kernels.test_properties import cases

TILED_HEAD_DIMS = (64, 32, 128)  # on tensor cores; others go to the general kernel
SEQLENS = (1, 2, 3, 5, 15, 16, 17, 33, 63, 64, 65, 100, 129, 200)
LONG_SEQLENS = (383, 512, 600, 1100)  # from 513 on, queries are split
HEAD_DIMS = (1, 2, 3, 8, 16, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96)
HEAD_DIMS += (100, 127, 128, 129, 160, 200, 255, 256)
BASE = AttentionCase(heads=1, head_dim=64, globals_per_row=((0, 20, 21, 60), (5,)))


def check(op: str, case: AttentionCase, dtype: torch.dtype, **options) -> None:
    assert_matches_reference(op, case, "cuda", "cpu", dtype, **options)


def in_every_dtype(values: Iterable) -> list[tuple]:
    """(value, dtype, head_dim): each value in each dtype, the head_dims of the tensor cores in turns."""
    pairs = itertools.product(values, DTYPES)
    return [(*pair, TILED_HEAD_DIMS[i % 3]) for i, pair in enumerate(pairs, start=1)]


@pytest.mark.parametrize("op", OPS)
class TestAgainstReference:
    @pytest.mark.parametrize(("seqlen", "dtype", "head_dim"), in_every_dtype(SEQLENS), ids=name_of)
    def test_seqlen(self, op, seqlen, dtype, head_dim):
        check(
            op, at_seqlen(BASE, seqlen, head_dim=head_dim, padding="right" if seqlen > 3 else "none"), dtype
        )

    @pytest.mark.parametrize(("seqlen", "dtype"), in_turns(LONG_SEQLENS, DTYPES), ids=name_of)
    def test_long_sequence(self, op, seqlen, dtype):
        case = replace(BASE, seqlen=seqlen, batch=1, window_size=150, globals_per_row=((0, 300, seqlen - 1),))
        check(op, case, dtype)

    @pytest.mark.parametrize(("dtype", "head_dim"), in_turns(DTYPES, (128, 64, 32)), ids=name_of)
    def test_many_globals(self, op, dtype, head_dim):
        """Few splits, of several tiles each."""
        case = replace(
            BASE, seqlen=400, batch=1, head_dim=head_dim, globals_per_row=(tuple(range(1, 400, 3)),)
        )
        check(op, case, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dim(self, op, head_dim, dtype):
        check(op, replace(BASE, head_dim=head_dim, window_size=20), dtype)

    @pytest.mark.parametrize(("padding", "dtype", "head_dim"), in_every_dtype(PADDINGS), ids=name_of)
    def test_padding(self, op, padding, dtype, head_dim):
        check(op, replace(BASE, seqlen=150, head_dim=head_dim, window_size=40, padding=padding), dtype)

    @pytest.mark.parametrize(
        ("globals_", "padding", "dtype"),
        in_turns((*GLOBALS, *GLOBALS), ("none", "holes", "left"), DTYPES[::-1]),
        ids=name_of,
    )
    def test_globals(self, op, globals_, padding, dtype):
        check(op, replace(BASE, globals_per_row=GLOBALS[globals_], padding=padding), dtype)

    @pytest.mark.parametrize(
        ("globals_", "dtype", "head_dim"),
        in_every_dtype(("none", "counts-differ", "one-row-only", "seventeen", "all")),
        ids=name_of,
    )
    def test_packed(self, op, globals_, dtype, head_dim):
        case = replace(
            BASE, packed=True, head_dim=head_dim, window_size=(2, 9), globals_per_row=GLOBALS[globals_]
        )
        check(op, case, dtype)

    @pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(
        ("padding", "packed", "head_dim"), [("holes", False, 64), ("none", True, 128), ("none", False, 24)]
    )
    def test_dropout(self, op, padding, packed, head_dim, dtype, dropout_p):
        case = at_seqlen(
            BASE, 85, head_dim=head_dim, dropout_p=dropout_p, padding=padding, packed=packed, heads=2
        )
        check(op, case, dtype)

    @pytest.mark.parametrize(
        ("softmax_scale", "dtype"), in_turns((0.0, 0.01, -0.3, 1.5, 0.5, -1.0), DTYPES), ids=name_of
    )
    def test_softmax_scale(self, op, softmax_scale, dtype):
        # probabilities carry the rounding of their score, and 1.5 makes scores of 50
        floor = {"floor_ulps": 25} if dtype == torch.float32 else {}
        check(op, replace(BASE, softmax_scale=softmax_scale), dtype, **floor)

    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(("packed", "fused"), [(False, True), (True, False)])
    def test_more_heads_and_rows(self, op, packed, fused, dtype):
        case = AttentionCase(
            3, 90, 3, head_dim=32, globals_per_row=((1,), (4, 70), ()), padding="left", packed=packed
        )
        check(op, case, dtype, fused=fused)

    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize("head_dim", TILED_HEAD_DIMS)
    def test_rows_of_no_alignment(self, op, head_dim, dtype):
        """q, k and v whose addresses and strides are multiples of an element alone."""
        case = replace(BASE, head_dim=head_dim, heads=2)
        mask = case.mask()
        inputs = case.inputs(mask, dtype, poison_padding=False)
        function = {"banded": banded_attention, "global": global_attention}[op]
        window = {"window_size": case.window_size} if op == "banded" else {}
        if op == "global":
            inputs = (inputs[0][:, : mask.max_globals], *inputs[1:])

        def results(inputs):
            inputs = tuple(x.detach().requires_grad_() for x in inputs)
            out = function(*inputs, mask, backend="cuda", **window)
            d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            return [out, *torch.autograd.grad(out, inputs, unaligned(d_out))]

        for actual, expected in zip(results([unaligned(x) for x in inputs]), results(inputs), strict=True):
            assert_within_error_bound(actual, expected.double(), expected, "result")


@pytest.mark.parametrize("op", OPS)
class TestPieces:
    @pytest.mark.parametrize("case", HALO_CASES)
    @pytest.mark.parametrize(("dtype", "head_dim"), in_turns(DTYPES, TILED_HEAD_DIMS), ids=name_of)
    def test_halo_and_positions(self, op, case, dtype, head_dim):
        check(op, replace(HALO_CASES[case], head_dim=head_dim), dtype)

    @pytest.mark.parametrize("case", CUT_CASES)
    @pytest.mark.parametrize(
        ("dtype", "head_dim"), in_turns((*DTYPES, torch.bfloat16), (64, 128, 32, 24)), ids=name_of
    )
    def test_pieces_match_the_whole(self, op, case, dtype, head_dim):
        assert_pieces_match_whole(op, replace(CUT_CASES[case], head_dim=head_dim), "cuda", "cpu", dtype)


def test_far_halo_is_not_read():
    assert_far_halo_is_not_read("cuda", "cpu", torch.float32, halo=400, poisoned=200)


@pytest.mark.parametrize(("window_size", "dtype", "head_dim"), in_every_dtype(WINDOWS), ids=name_of)
def test_window(window_size, dtype, head_dim):
    check("banded", at_seqlen(BASE, 150, head_dim=head_dim, window_size=window_size), dtype)


@pytest.mark.parametrize(("window_size", "dtype"), in_turns((1, (0, 20), (-1, 4)), DTYPES), ids=name_of)
def test_window_over_holes(window_size, dtype):
    check("banded", at_seqlen(BASE, 80, window_size=window_size, padding="holes"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head_dim", [20, *TILED_HEAD_DIMS])
def test_both_ops_merged(head_dim, dtype):
    case = replace(BASE, heads=2, head_dim=head_dim, window_size=(9, 30), padding="right")
    check("longformer", case, dtype)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=40)
@given(case=cases(), head_dim=st.sampled_from((None, 32, 64, 128)), dtype=st.sampled_from(DTYPES))
def test_drawn_cases(op, case, head_dim, dtype):
    # wider than by default: where a row has one key, gradients vanish but for the rounding of out, and plain's error
    floor = 32 if dtype == torch.float32 else 16
    check(op, replace(case, head_dim=head_dim or case.head_dim), dtype, floor_ulps=floor)


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, "longformer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window_size", [0, 31, 64, 130, (200, 1), (1, 200), -1], ids=name_of)
@pytest.mark.parametrize("head_dim", [7, 32, 64, 72, 128, 192])
@pytest.mark.parametrize("seqlen", [63, 129, 256, 511])
def test_larger_grid(op, seqlen, head_dim, window_size, dtype):
    padding = PADDINGS[(seqlen + head_dim) % len(PADDINGS)]
    check(op, at_seqlen(BASE, seqlen, head_dim=head_dim, window_size=window_size, padding=padding), dtype)
