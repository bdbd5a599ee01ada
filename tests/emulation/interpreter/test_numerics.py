"""The interpreter's bf16 and tf32 against torch's, operation by operation."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.emulation.interpreter.numerics import bfloat16_of, float32_of, round_to_tf32

SIZE = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    one = tl.full([SIZE, SIZE], 1.0, tl.float32)
    product = tl.dot(tl.load(a_ptr + at), tl.trans(tl.load(b_ptr + at)), one, input_precision=PRECISION)
    tl.store(out_ptr + at, product)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + SIZE + at, x - y)
    tl.store(out_ptr + 2 * SIZE + at, x * y)
    tl.store(out_ptr + 3 * SIZE + at, tl.maximum(x, y))
    tl.store(out_ptr + 4 * SIZE + at, tl.minimum(x, y))
    tl.store(out_ptr + 5 * SIZE + at, tl.where(x < y, x, -y))
    tl.store(out_ptr + 6 * SIZE + at, tl.abs(x))
    tl.store(out_ptr + 7 * SIZE + at, tl.fma(x, y, y))
    tl.store(out_ptr + 8 * SIZE + at, tl.full([SIZE], 0.1, tl.bfloat16))
    tl.store(out_ptr + 9 * SIZE + at, tl.clamp(x, -y.to(tl.float32).to(tl.bfloat16), y))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at[:, None] * SIZE + at[None, :])
    tl.store(out_ptr + at, tl.sum(x, 1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_of_every_kind_of_float():
    """All exponents and the ties: fp32 bit patterns of which every part of the low half is drawn."""
    high = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (high + low).flatten().to(torch.uint32).view(torch.float32)
    expected = x.to(torch.bfloat16)
    actual = torch.from_numpy(bfloat16_of(x.numpy())).view(torch.bfloat16)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])
    back = torch.from_numpy(float32_of(actual.view(torch.uint16).numpy()))
    assert torch.equal(back.nan_to_num(), expected.float().nan_to_num())


def test_rounding_to_tf32():
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-11, 3e38, float("inf"), float("nan")])
    expected = torch.tensor([1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-9, 3e38, float("inf"), float("nan")])
    actual = torch.from_numpy(round_to_tf32(x.numpy()))
    torch.testing.assert_close(actual, expected, rtol=2**-11, atol=0, equal_nan=True)
    assert torch.equal(actual[:4], expected[:4])


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_casts(source, result):
    x = (100 * random(SIZE)).to(source)
    out = torch.empty(SIZE, dtype=result)
    _cast_kernel[(1,)](x, out, SIZE)
    assert torch.equal(out, x.to(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_multiplies_exactly(dtype):
    a, b = random(SIZE, SIZE).to(dtype), random(SIZE, SIZE, seed=1).to(dtype)
    out = torch.empty(SIZE, SIZE)
    _dot_kernel[(1,)](a, b, out, SIZE, "ieee")
    torch.testing.assert_close(out.double(), a.double() @ b.double().T + 1, rtol=0, atol=2e-5)


def test_dot_in_tf32():
    a, b = random(SIZE, SIZE), random(SIZE, SIZE, seed=1)
    out = torch.empty(SIZE, SIZE)
    _dot_kernel[(1,)](a, b, out, SIZE, "tf32")
    rounded = [torch.from_numpy(round_to_tf32(x.numpy())).double() for x in (a, b)]
    torch.testing.assert_close(out.double(), rounded[0] @ rounded[1].T + 1, rtol=0, atol=2e-5)
    assert (out.double() - a.double() @ b.double().T - 1).abs().max() > 1e-3


def test_arithmetic_rounds_once():
    x, y = random(SIZE).bfloat16(), random(SIZE, seed=1).bfloat16()
    out = torch.empty(10, SIZE, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, out, SIZE)
    fused = (x.float() * y.float() + y.float()).bfloat16()
    clamped = torch.minimum(torch.maximum(x, -y), y)
    rows = [x + y, x - y, x * y, x.maximum(y), x.minimum(y), torch.where(x < y, x, -y), x.abs(), fused]
    for row, expected in enumerate([*rows, torch.full_like(x, 0.1), clamped]):
        assert torch.equal(out[row], expected), row


def test_reduction_in_bfloat16_is_refused():
    out = torch.empty(SIZE)
    with pytest.raises(InterpreterError, match="cast to fp32"):
        _sum_kernel[(1,)](random(SIZE, SIZE).bfloat16(), out, SIZE)
    _sum_kernel[(1,)](random(SIZE, SIZE), out, SIZE)
    torch.testing.assert_close(out, random(SIZE, SIZE).sum(1), rtol=0, atol=1e-5)
