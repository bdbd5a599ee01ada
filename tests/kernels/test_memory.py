"""What lies in memory otherwise than a tensor's shape says, and rows of a result that no kernel computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from led_kernels import LongformerMask, banded_attention, global_attention, ops
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from led_kernels.testing import poisoned_memory
from tests.backends import backends_on, needs_extension

BACKENDS = ["reference", *backends_on("cpu")]


def shrunken(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(8)
    return x


def misaligned(x: Tensor) -> Tensor:
    """Returns the same numbers an odd number of bytes behind the start of their memory."""
    memory = bytearray(x.nbytes + 1)
    memory[1:] = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


@needs_extension
@torch.no_grad()
@pytest.mark.parametrize("weight", [torch.randn(64, 64), torch.randn(64, 64).T], ids=["as is", "transposed"])
def test_a_weight_whose_storage_was_shrunk(weight):
    linear, x = nn.Linear(64, 64), torch.randn(1, 64)
    linear.weight = nn.Parameter(shrunken(weight))
    with pytest.raises(ValueError, match=r"weight (is smaller|needs)"):
        few_rows_linear(linear, x)
    norm = nn.LayerNorm(64)
    norm.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight"):
        few_rows_add_norm(x, x, norm)


@needs_extension
@torch.no_grad()
def test_a_cache_whose_storage_was_shrunk():
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="v is smaller"):
        decode_attention(q, k, shrunken(torch.randn(1, 2, 9, 8)))
    with pytest.raises(ValueError, match="cache is smaller"):
        write_rows(shrunken(torch.randn(1, 2, 9, 8)), torch.tensor([3]), q)
    with pytest.raises(ValueError, match="rows"):
        write_rows(k, torch.tensor([3]), shrunken(torch.randn(1, 2, 8, 1).mT))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["k", "token_kind", "global_index"])
def test_attention_over_a_storage_that_was_shrunk(backend, name):
    mask = LongformerMask.from_lengths([900], 900, [0, 2, 5])
    q, k, v = torch.randn(3, 1, 900, 2, 8).unbind()
    if name == "k":
        k = shrunken(torch.randn(1, 900, 2, 8))
    else:
        getattr(mask, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{name}.* (is smaller|was not set|shrunk)"):
        banded_attention(q, k, v, mask, window_size=4, backend=backend)
    if name == "k":
        with pytest.raises(ValueError, match=r"k.* (is smaller|was not set|shrunk)"):
            global_attention(q[:, :3], k, v, mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_tensors_at_odd_addresses(backend):
    mask = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 1, 1, 0]]))
    q, k, v = torch.randn(3, 1, 6, 2, 4).unbind()
    expected = banded_attention(q, k, v, mask, window_size=2, backend=backend)
    odd = [misaligned(x).requires_grad_() for x in (q, k, v)]
    out = banded_attention(*odd, mask, window_size=2, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(
        global_attention(odd[0][:, :1], *odd[1:], mask, backend=backend),
        global_attention(q[:, :1], k, v, mask, backend=backend),
    )
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in odd)
    if backend == "cpu":
        with pytest.raises(ValueError, match="seq_len of the mask lies at an address"):
            banded_attention(q, k, v, replace(mask, seq_len=misaligned(mask.seq_len)), window_size=2)


@needs_extension
@torch.no_grad()
def test_few_rows_of_tensors_at_odd_addresses():
    linear, norm, x = nn.Linear(8, 5), nn.LayerNorm(8), torch.randn(2, 8)
    expected = few_rows_linear(linear, x)
    linear.weight, linear.bias = (nn.Parameter(misaligned(p.detach())) for p in (linear.weight, linear.bias))
    assert torch.equal(few_rows_linear(linear, misaligned(x)), expected)
    assert torch.equal(few_rows_add_norm(misaligned(x), misaligned(x), norm), few_rows_add_norm(x, x, norm))
    q, k, v = torch.randn(3, 1, 2, 3, 8).unbind()
    odd = decode_attention(misaligned(q), misaligned(k), misaligned(v))
    assert torch.equal(odd, decode_attention(q, k, v))
    position, rows = torch.tensor([2]), q[:, :, :1].clone()
    for given in (
        (misaligned(k), position, rows),
        (k, misaligned(position), rows),
        (k, position, misaligned(rows)),
    ):
        with pytest.raises(ValueError, match=r"lies at an address .* call \.clone\(\)"):
            write_rows(*given)


def operators(backend: str, mask: LongformerMask, rows: int) -> dict[str, Tensor]:
    """Returns what has a row per row of the packed tensors, from the operators, which look at no values."""
    q, k, v, d_out = torch.randn(4, rows, 2, 8).unbind()
    fields = (*mask.tensors(), None, mask.max_seqlen)
    with poisoned_memory():
        out, lse = ops.banded_forward(q, k, v, *fields, 2, 2, 0.5, 0.0, backend)
        grads = ops.banded_backward(d_out, None, q, k, v, out, lse, *fields, 2, 2, 0.5, 0.0, backend)
        slots = torch.randn(mask.batch, mask.max_globals, 2, 8)
        out_global, lse_global = ops.global_forward(slots, k, v, *fields, 0.5, 0.0, backend)
        saved = (slots, k, v, out_global, lse_global)
        global_grads = ops.global_backward(slots, None, *saved, *fields, 0.5, 0.0, backend)
    results = {"out": out, "lse": lse.T} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return results | {"dk_global": global_grads[1], "dv_global": global_grads[2]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [[0, 4], [2, 7]], ids=["behind", "before and between"])
def test_rows_of_no_sequence(backend, start):
    """Of masks whose lengths were changed, or that have a capacity of rows, as a compiled program may have."""
    mask = LongformerMask.packed([0, 4, 8], [[0], [1]], total_rows=8)
    kind = torch.ones(14).byte()
    kind[[start[0], start[1] + 1]] = 2
    seq_start, seq_len = torch.tensor(start).int(), torch.tensor([3, 4]).int()
    rows = {"token_kind": kind, "padding_before": torch.zeros(14).int()}
    mask = replace(mask, seq_start=seq_start, seq_len=seq_len, **rows)
    is_row = torch.zeros(14).bool()
    for first, length in zip(start, (3, 4), strict=True):
        is_row[first : first + length] = True
    for name, x in operators(backend, mask, 14).items():
        expected = float("inf") if name == "lse" else 0.0
        assert (x[~is_row] == expected).all(), name
        assert not x.isnan().any(), name


@needs_extension
def test_sequences_that_overlap_are_refused():
    mask = LongformerMask.packed([0, 4, 8])
    mask.seq_start[1] = 2
    with pytest.raises(ValueError, match="seq_start of the mask lies in the sequence before"):
        banded_attention(*torch.randn(3, 8, 2, 4), mask, window_size=1, backend="cpu")
