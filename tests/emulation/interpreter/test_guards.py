"""A kernel that leaves its tensors is caught, one that keeps to them is not changed by the guards."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.emulation.interpreter.guards import OutOfBounds


@triton.jit
def _copy_kernel(x_ptr, out_ptr, x_stride, out_stride, offset, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * x_stride, mask=at < size, other=0)
    tl.store(out_ptr + at * out_stride + offset, x, mask=at < size)


@triton.jit
def _load_kernel(x_ptr, out_ptr, offset, BLOCK: tl.constexpr):
    """Loads more than it uses."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + offset)
    tl.store(out_ptr + at, tl.where(at < BLOCK - 1, x, 0), mask=at < BLOCK - 1)


def copy(x: torch.Tensor, out: torch.Tensor, offset: int = 0, size: int | None = None) -> None:
    block = triton.next_power_of_2(len(x))
    _copy_kernel[(1,)](x, out, x.stride(0), out.stride(0), offset, len(x) if size is None else size, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.int64])
def test_what_is_written_comes_back(dtype):
    x = torch.arange(13).to(dtype)
    out = torch.zeros(13, dtype=dtype)
    copy(x, out)
    assert torch.equal(out, x)


def test_views_keep_their_strides_and_neighbors():
    memory = torch.arange(60.0)
    target = torch.full((60,), -1.0)
    copy(memory[3:51:4], target[2:38:3])
    expected = torch.full((60,), -1.0)
    expected[2:38:3] = memory[3:51:4]
    assert torch.equal(target, expected)


def test_views_of_one_memory():
    """As q, k and v of a fused projection; the one that is written does not undo another's change."""
    memory = torch.arange(20.0)
    copy(memory[:10], memory[10:])
    assert torch.equal(memory, torch.arange(10.0).repeat(2))


def test_expanded_tensor():
    out = torch.zeros(9)
    copy(torch.tensor([3.0]).expand(9), out)
    assert (out == 3).all()


def test_nan_is_copied_as_it_is():
    out = torch.zeros(4)
    copy(torch.full((4,), float("nan")), out)
    assert out.isnan().all()


@pytest.mark.parametrize("offset", [1, 7, -1, 5000, -(10**9)])
def test_store_out_of_bounds(offset):
    x, out = torch.ones(10), torch.zeros(10)
    with pytest.raises(InterpreterError, match=r"store outside of out_ptr|store far from every tensor"):
        copy(x, out, offset)
    assert (out == 0).all()


def test_store_between_the_elements_of_a_view():
    x, memory = torch.ones(10), torch.zeros(10, 2)
    with pytest.raises(OutOfBounds, match=r"9 elements beside out_ptr were written, the first at 1"):
        copy(x[:9], memory[:, 0], offset=1)
    assert (memory == 0).all()


@pytest.mark.parametrize("offset", [1, -1])
def test_load_out_of_bounds_though_not_used(offset):
    x, out = torch.ones(8), torch.zeros(8)
    _load_kernel[(1,)](x, out, 0, 8)
    with pytest.raises(
        InterpreterError, match=r"load outside of x_ptr \(8,\), strides \(1,\): 1 of 8 elements"
    ):
        _load_kernel[(1,)](x, out, offset, 8)


def test_load_between_the_elements_of_a_view_is_nan():
    memory, out = torch.zeros(8, 2), torch.zeros(8)
    _load_kernel[(1,)](memory[:, 0], out, 0, 8)
    assert out.isnan().tolist() == [False, True] * 3 + [False, False]


def test_empty_tensor_may_not_be_touched():
    empty, out = torch.zeros(0), torch.zeros(4)
    _copy_kernel[(1,)](empty, out, 1, 1, 0, 0, 4)
    with pytest.raises(InterpreterError, match="load far from every tensor"):
        _load_kernel[(1,)](empty, out, 0, 4)
