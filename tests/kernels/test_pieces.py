"""Every backend computes pieces of a sequence as if it were whole: rows of a halo, positions for dropout, merging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from led_kernels import LongformerMask, absorbed_global_attention, banded_attention, global_attention
from led_kernels.attention_weights import banded_attention_weights, global_attention_weights
from led_kernels.mask import PADDING
from led_kernels.testing import AttentionCase, assert_matches_reference, poisoned_memory
from tests.conftest import Target
from tests.kernels.kernel_cases import HALO_CASES, OPS, name_of
from tests.kernels.pieces import (
    CUT_CASES,
    assert_far_halo_is_not_read,
    assert_pieces_match_whole,
    global_piece,
    merge,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", [*OPS, "longformer"])
@pytest.mark.parametrize("case", HALO_CASES.values(), ids=HALO_CASES.keys())
def test_halo_and_positions(case: AttentionCase, op: str, dtype: torch.dtype, target: Target):
    target.require(dtype)
    assert_matches_reference(op, case, target.backend, target.device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CUT_CASES.values(), ids=CUT_CASES.keys())
def test_pieces_match_the_whole(case: AttentionCase, op: str, dtype: torch.dtype, target: Target):
    target.require(dtype)
    assert_pieces_match_whole(op, case, target.backend, target.device, dtype)


@pytest.mark.parametrize("op", OPS)
def test_pieces_that_threads_share(op: str, target: Target):
    case = replace(CUT_CASES["globals"], seqlen=1700, window_size=(130, 90), heads=1)
    assert_pieces_match_whole(op, case, target.backend, target.device, torch.float32, num_pieces=2)


@pytest.mark.parametrize("op", OPS)
def test_pieces_of_the_reference(op: str):
    """Which the others are compared with."""
    for case in CUT_CASES.values():
        assert_pieces_match_whole(op, case, "reference", "cpu", torch.float64)


def test_far_halo_is_not_read(target: Target):
    assert_far_halo_is_not_read(target.backend, target.device, torch.float32, halo=700, poisoned=400)


def test_a_piece_without_keys(target: Target):
    """Global tokens of another piece, in a batch whose second sequence is all padding here."""
    case = AttentionCase(seqlen=40, globals_per_row=((3,), (1, 2)), padding="right")
    whole = case.mask(target.device)
    mask = global_piece(whole, (30, 40)).mask
    assert mask.seq_len.tolist() == [0, 0]
    assert mask.num_globals.tolist() == [1, 2]
    _, k, v = (x[:, :12].clone().requires_grad_() for x in case.inputs(mask, poison_padding=False))
    k.data[:], v.data[:] = float("nan"), float("nan")
    q = torch.randn(2, 2, 2, 16, device=target.device, requires_grad=True)
    with poisoned_memory():
        out, lse = global_attention(q, k, v, mask, return_lse=True, backend=target.backend)
        assert not out.any()
        assert torch.equal(lse, torch.full_like(lse, float("inf")))
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    for grad in grads:
        assert not grad.any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_pieces_of_absorbed_attention(dropout_p: float):
    """Merged by lse, with all gradients; the last piece of one sequence holds no key."""
    case = AttentionCase(seqlen=60, globals_per_row=((0, 44), (7,)), padding="right")
    whole, heads, head_dim, d_model = case.mask(), 2, 8, 20
    assert whole.seq_len[1] <= 40
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 60, d_model), (2, 2, heads, head_dim), (16, d_model), (16, d_model), (16,)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    hidden, *others = inputs

    def absorbed(hidden, mask):
        torch.manual_seed(0)
        return absorbed_global_attention(hidden, *others, mask, dropout_p=dropout_p, return_lse=True)

    expected = absorbed(hidden, whole)
    pieces = [global_piece(whole, own) for own in ((0, 18), (18, 40), (40, 60))]
    results = [absorbed(piece.gather(hidden, float("nan")), piece.mask) for piece in pieces]
    assert results[-1][1][1].isinf().all()
    merged = merge(*(torch.stack(x) for x in zip(*results, strict=True)))
    for one, other in zip(merged, expected, strict=True):
        torch.testing.assert_close(one, other)
    d_outputs = [torch.randn_like(x).masked_fill(x.isinf(), 0) for x in expected]
    for one, other in zip(
        *(torch.autograd.grad(x, inputs, d_outputs) for x in (merged, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [HALO_CASES["halo"], HALO_CASES["halo-and-holes"]], ids=["none", "holes"])
def test_attention_weights_over_a_halo(case: AttentionCase):
    case = replace(case, dropout_p=0.0)
    mask = case.mask()
    q, k, v = (x.nan_to_num() for x in case.inputs(mask, torch.float64))
    weights = banded_attention_weights(
        q, k, mask, case.window_size
    )  # [batch, seqlen, heads, globals + window]
    window, (batch, seqlen) = case.window_size, q.shape[:2]
    at = torch.arange(batch)[:, None]
    v_globals = v[at, mask.global_index.clamp(min=0).long()].transpose(1, 2)[:, None]
    v_window = torch.nn.functional.pad(v, (0, 0, 0, 0, window, window)).unfold(1, 2 * window + 1, 1)
    values = torch.cat([v_globals.expand(-1, seqlen, -1, -1, -1), v_window.transpose(3, 4)], 3)
    out = (weights[..., None] * values).sum(3)
    torch.testing.assert_close(out, banded_attention(q, k, v, mask, window_size=window, backend="reference"))


def test_attention_weights_of_global_tokens_that_lie_elsewhere():
    case = AttentionCase(globals_per_row=((0, 44), (7,)), padding="right")
    whole = case.mask()
    piece = global_piece(whole, (20, 40))
    _, k, v = case.inputs(piece.mask, torch.float64, poison_padding=False)
    q = torch.randn(2, 2, 2, 16, dtype=torch.float64)
    out = (global_attention_weights(q, k, piece.mask) @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, global_attention(q, k, v, piece.mask, backend="reference"))
    assert isinstance(piece.mask, LongformerMask)
    assert (piece.mask.token_kind != PADDING).any()
