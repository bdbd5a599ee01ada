"""Rows so far apart that a tile of them spans 2^31 elements and more: views into a buffer of gigabytes.

Only the pages that hold a row are touched, so that the buffer costs little memory.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from led_kernels import LongformerMask, banded_attention, global_attention
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.launch import WIDE_ROW_STRIDE, sequence_arguments

HEAD_DIM = 16


def far_apart(shape: tuple[int, ...], row_stride: int, count: int) -> list[Tensor]:
    """``count`` random fp16 tensors ``[1, rows, 1, HEAD_DIM]`` whose rows lie in turns in one buffer."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.empty((shape[1] - 1) * row_stride + count * HEAD_DIM, dtype=torch.float16)
    strides = (0, row_stride, HEAD_DIM, 1)
    views = [buffer.as_strided(shape, strides, i * HEAD_DIM) for i in range(count)]
    for view in views:
        view.copy_(torch.randn(shape, generator=generator))
    return views


def with_gradients(attention, inputs: list[Tensor], d_out: Tensor, **options) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def assert_as_contiguous(attention, inputs: list[Tensor], d_out: Tensor, **options) -> None:
    result = with_gradients(attention, inputs, d_out, **options)
    expected = with_gradients(attention, [x.contiguous() for x in inputs], d_out.contiguous(), **options)
    for x, expected_x in zip(result, expected, strict=True):
        assert torch.equal(x, expected_x)


def test_banded():
    """The last rows of a tile of 128 queries or keys lie behind 2^31 elements."""
    seqlen = 130
    q, k, v, d_out = far_apart((1, seqlen, 1, HEAD_DIM), 2**24 + 2**20, 4)
    mask = LongformerMask.from_lengths([seqlen], seqlen, global_index=[0, seqlen - 1])
    assert_as_contiguous(banded_attention, [q, k, v], d_out, mask=mask, window_size=40)


@pytest.mark.parametrize("num_globals", [1, 34])
def test_global(num_globals):
    """Tiles of 32 keys, or of 32 global tokens too: only wider rows reach behind 2^31 elements."""
    seqlen = 34
    q, k, v, d_out = far_apart((1, seqlen, 1, HEAD_DIM), 2**26 + 2**23, 4)
    mask = LongformerMask.from_lengths([seqlen], seqlen, global_index=list(range(num_globals)))
    inputs = [q[:, :num_globals], k, v]
    assert_as_contiguous(global_attention, inputs, d_out[:, :num_globals], mask=mask)


@pytest.mark.parametrize("shape", [(2, 3, 1, HEAD_DIM), (3, 1, HEAD_DIM)], ids=["padded", "packed"])
def test_only_wide_rows_are_copied(shape):
    mask = LongformerMask.from_lengths([3, 3], 3)
    buffer = torch.empty(1 + 2 * WIDE_ROW_STRIDE + HEAD_DIM, dtype=torch.float16)
    batch = [0] * (len(shape) - 3)
    wide, narrow = (
        buffer.as_strided(shape, (*batch, stride, HEAD_DIM, 1))
        for stride in (WIDE_ROW_STRIDE, WIDE_ROW_STRIDE - 1)
    )
    arguments = sequence_arguments(mask, q=narrow, k=wide)
    assert arguments["q_ptr"] is narrow
    assert arguments["q_stride_s"] == WIDE_ROW_STRIDE - 1
    assert arguments["k_ptr"].shape == shape
    assert arguments["k_stride_s"] == HEAD_DIM


@pytest.mark.parametrize(
    ("batch", "max_globals", "heads", "message"),
    [
        (2**15, 2**16, 1, "2,147,483,648 slots of global tokens"),
        (2**15 + 1, 0, 2**16 - 1, "2,147,516,415 heads of its sequences"),
    ],
)
def test_counts_beyond_int32_are_refused(batch, max_globals, heads, message):
    mask = SimpleNamespace(batch=batch, max_globals=max_globals)
    q = torch.empty((batch, 1, heads, 1), dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=f"mask has {message}, .*; split the batch"):
        sequence_arguments(mask, q=q)


def test_tiles_of_narrow_rows_span_less_than_2_to_the_31():
    rows = max(max(row.config[:2]) for table in configs.TABLE.values() for row in table)
    assert rows * (WIDE_ROW_STRIDE - 1) < 2**31
    most_heads, most_head_dim = 65_535, 256
    assert most_heads * most_head_dim < WIDE_ROW_STRIDE  # so that a contiguous copy is narrow
