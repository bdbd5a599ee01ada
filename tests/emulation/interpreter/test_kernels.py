"""Every Triton kernel, forward and backward, against the fp64 reference, in small tiles: several of each kind at once.

What a value of one parameter is tried with (dtype, tiles, the op) takes turns, so that the group stays short; the
drawn cases mix all, and ``-m slow`` runs a larger grid.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from led_kernels.testing import AttentionCase, assert_matches_reference
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

TILES = ((32, 16), (16, 32), (16, 16), (64, 32))  # BLOCK_M, BLOCK_N
SEQLENS = (1, 2, 3, 5, 15, 16, 17, 33, 64, 65, 100, 129)
LONG_SEQLENS = (383, 511, 512)
HEAD_DIMS = (1, 3, 16, 24, 33, 64, 80, 128)
BASE = AttentionCase(heads=1, globals_per_row=((0, 20, 21, 60), (5,)))


def check(
    op: str, case: AttentionCase, dtype: torch.dtype, tiles: tuple[int, int] = TILES[0], **options
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LED_KERNELS_TRITON_CONFIG", "{}x{}x4x2".format(*tiles))
        assert_matches_reference(op, case, "triton", "cpu", dtype, **options)


@pytest.mark.parametrize("op", OPS)
class TestAgainstReference:
    @pytest.mark.parametrize(("seqlen", "dtype", "tiles"), in_turns(SEQLENS, DTYPES, TILES), ids=name_of)
    def test_seqlen(self, op, seqlen, dtype, tiles):
        check(op, at_seqlen(BASE, seqlen, padding="right" if seqlen > 3 else "none"), dtype, tiles)

    @pytest.mark.parametrize(("seqlen", "dtype"), in_turns(LONG_SEQLENS, DTYPES), ids=name_of)
    def test_long_sequence(self, op, seqlen, dtype):
        case = replace(BASE, seqlen=seqlen, batch=1, window_size=100, globals_per_row=((0, 300, seqlen - 1),))
        check(op, case, dtype, (64, 32))

    @pytest.mark.parametrize(("head_dim", "dtype"), in_turns(HEAD_DIMS, DTYPES), ids=name_of)
    def test_head_dim(self, op, head_dim, dtype):
        check(op, replace(BASE, head_dim=head_dim, window_size=20), dtype)

    @pytest.mark.parametrize(("padding", "dtype", "tiles"), in_turns(PADDINGS, DTYPES, TILES), ids=name_of)
    def test_padding(self, op, padding, dtype, tiles):
        check(op, replace(BASE, seqlen=90, window_size=20, padding=padding), dtype, tiles)

    @pytest.mark.parametrize(
        ("globals_", "padding", "dtype"), in_turns(GLOBALS, ("none", "holes"), DTYPES), ids=name_of
    )
    def test_globals(self, op, globals_, padding, dtype):
        check(op, replace(BASE, globals_per_row=GLOBALS[globals_], padding=padding), dtype)

    @pytest.mark.parametrize(
        ("globals_", "dtype", "tiles"),
        in_turns(("none", "counts-differ", "one-row-only", "seventeen", "all"), DTYPES, TILES),
        ids=name_of,
    )
    def test_packed(self, op, globals_, dtype, tiles):
        case = replace(BASE, packed=True, window_size=(2, 9), globals_per_row=GLOBALS[globals_])
        check(op, case, dtype, tiles)

    @pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("padding", "packed", "dtype", "tiles"),
        [("holes", False, torch.float32, (32, 16)), ("none", True, torch.bfloat16, (16, 32))],
        ids=name_of,
    )
    def test_dropout(self, op, padding, packed, dtype, tiles, dropout_p):
        case = at_seqlen(BASE, 45, dropout_p=dropout_p, padding=padding, packed=packed, heads=2)
        check(op, case, dtype, tiles)

    @pytest.mark.parametrize(
        ("softmax_scale", "dtype"), in_turns((0.0, 0.01, -0.3, 1.5), DTYPES), ids=name_of
    )
    def test_softmax_scale(self, op, softmax_scale, dtype):
        # probabilities carry the rounding of their score, and 1.5 makes scores of 25
        floor = {"floor_ulps": 25} if dtype == torch.float32 else {}
        check(op, replace(BASE, softmax_scale=softmax_scale), dtype, **floor)

    @pytest.mark.parametrize(("packed", "fused"), [(False, True), (True, False)])
    def test_more_heads_and_rows(self, op, packed, fused):
        case = AttentionCase(3, 70, 3, globals_per_row=((1,), (4, 30), ()), padding="left", packed=packed)
        check(op, case, torch.bfloat16, (64, 32), fused=fused)


@pytest.mark.parametrize("op", OPS)
class TestPieces:
    @pytest.mark.parametrize(("case", "dtype", "tiles"), in_turns(HALO_CASES, DTYPES, TILES), ids=name_of)
    def test_halo_and_positions(self, op, case, dtype, tiles):
        check(op, replace(HALO_CASES[case], heads=1), dtype, tiles)

    @pytest.mark.parametrize(("case", "dtype"), in_turns(CUT_CASES, DTYPES), ids=name_of)
    def test_pieces_match_the_whole(self, op, case, dtype, monkeypatch):
        monkeypatch.setenv("LED_KERNELS_TRITON_CONFIG", "32x16x4x2")
        assert_pieces_match_whole(op, replace(CUT_CASES[case], heads=1), "triton", "cpu", dtype)


def test_tiles_of_halo_alone_multiply_nothing(monkeypatch):
    """Neither as queries, nor as keys that no local token sees."""
    dots, create_dot = [], InterpreterBuilder.create_dot

    def counted(*args):
        dots.append(args)
        return create_dot(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    case = replace(BASE, seqlen=70, globals_per_row=())
    check("banded", case, torch.float32)
    assert dots
    dots.clear()
    check("banded", replace(case, halo=(70, 0)), torch.float32)
    assert not dots


def test_far_halo_is_not_read(monkeypatch):
    monkeypatch.setenv("LED_KERNELS_TRITON_CONFIG", "32x16x4x2")
    assert_far_halo_is_not_read("triton", "cpu", torch.float32, halo=160, poisoned=96)


@pytest.mark.parametrize(("window_size", "dtype", "tiles"), in_turns(WINDOWS, DTYPES, TILES), ids=name_of)
def test_window(window_size, dtype, tiles):
    check("banded", at_seqlen(BASE, 110, window_size=window_size), dtype, tiles)


@pytest.mark.parametrize(("window_size", "dtype"), in_turns((1, (0, 20), (-1, 4)), DTYPES), ids=name_of)
def test_window_over_holes(window_size, dtype):
    check("banded", at_seqlen(BASE, 80, window_size=window_size, padding="holes"), dtype)


@pytest.mark.parametrize(("tiles", "dtype"), in_turns(TILES, DTYPES), ids=name_of)
def test_both_ops_merged(tiles, dtype):
    check("longformer", replace(BASE, heads=2, window_size=(9, 30), padding="right"), dtype, tiles)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    in_turns(
        ({"head_dim": 64}, {"padding": "holes"}, {"packed": True, "head_dim": 24}, {"dropout_p": 0.2}),
        (torch.bfloat16, torch.float32),
    ),
    ids=name_of,
)
def test_loads_by_descriptors(changes, dtype, monkeypatch):
    monkeypatch.setenv("LED_KERNELS_TRITON_TMA", "1")
    check("banded", replace(BASE, window_size=40, **changes), dtype, fused=False)


def test_default_tiles():
    """Those of the configuration, larger than the sequence."""
    assert_matches_reference("longformer", replace(BASE, padding="holes"), "triton", "cpu", torch.bfloat16)


def test_every_kernel_is_launched(launches):
    """By one global token and by more than a tile holds: no kernel is left out of this group."""
    launches.clear()
    for globals_ in ((0,), tuple(range(20))):
        case = AttentionCase(1, 30, 1, globals_per_row=(globals_,))
        check("longformer", case, torch.float32, tiles=(16, 16))
    kernels = [
        value
        for module_name, module in sys.modules.items()
        if module_name.startswith("led_kernels.backends.triton.")
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, InterpretedFunction)
    ]
    assert {kernel.fn for kernel in kernels} == {kernel.fn for kernel in launches}


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])  # a case takes seconds: nothing is shrunk
@given(case=cases(), dtype=st.sampled_from(DTYPES), tiles=st.sampled_from(TILES))
def test_drawn_cases(op, case, dtype, tiles):
    # wider than by default: where a row has one key, gradients vanish but for the rounding of out, and plain's error
    floor = 32 if dtype == torch.float32 else 16
    check(op, case, dtype, tiles, floor_ulps=floor)


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, "longformer"])
@pytest.mark.parametrize("window_size", [0, 31, 64, (200, 1), (1, 200), -1], ids=name_of)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "tiles"),
    in_turns((7, 16, 64, 96), DTYPES, (*TILES, (128, 64), (64, 128))),
    ids=name_of,
)
@pytest.mark.parametrize("seqlen", [63, 129, 300])
def test_larger_grid(op, seqlen, head_dim, dtype, tiles, window_size):
    padding = PADDINGS[(seqlen + head_dim) % len(PADDINGS)]
    check(
        op, at_seqlen(BASE, seqlen, head_dim=head_dim, window_size=window_size, padding=padding), dtype, tiles
    )
