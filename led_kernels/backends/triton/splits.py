"""These functions make one result of those of several splits, each of which has left one fp32 row of head_dim."""

from __future__ import annotations

import triton
import triton.language as tl

from led_kernels.backends.triton.tiles import load_rows


@triton.jit
def load_splits(partial_ptr, split, split_stride, num_splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads one row of each of the given splits, ``[len(split), BLOCK_D]``, zeros from ``num_splits`` on.

    Args:
        partial_ptr: the row of the first split; each further split lies ``split_stride`` rows on.
    """
    offsets = (split.to(tl.int64) * split_stride)[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
    return load_rows(partial_ptr, offsets, split < num_splits, HEAD_DIM, BLOCK_D, True)


@triton.jit
def sum_splits(
    partial_ptr, split_stride, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up the rows of all splits that :func:`load_splits` loads, ``[BLOCK_D]``, always in the same order."""
    acc = tl.zeros([BLOCK_SPLITS, BLOCK_D], tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        acc += load_splits(partial_ptr, split, split_stride, num_splits, HEAD_DIM, BLOCK_D)
    return tl.sum(acc, 0)
