"""These functions tell which probabilities of a tile dropout keeps, as :mod:`led_kernels.philox` does."""

from __future__ import annotations

import triton
import triton.language as tl

from led_kernels import philox

BANDED_STREAM = tl.constexpr(philox.BANDED_STREAM)
GLOBAL_STREAM = tl.constexpr(philox.GLOBAL_STREAM)


@triton.jit
def keep_of_tile(
    seed, query, key_start, batch_head, stream, last_dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tells which probabilities of queries ``[BLOCK_M]`` and keys from ``key_start`` (a multiple of 4) dropout keeps.

    One Philox draw serves four neighboring keys, so a quarter of the tile is drawn and its lanes interleaved.
    """
    group = key_start // 4 + tl.arange(0, BLOCK_N // 4)
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, group[None, :] + zeros, query[:, None] + zeros, batch_head + zeros, zeros + stream
    )
    even = tl.interleave(lane_0 > last_dropped, lane_2 > last_dropped)
    odd = tl.interleave(lane_1 > last_dropped, lane_3 > last_dropped)
    return tl.interleave(even, odd)


@triton.jit
def keep_of_global_keys(
    seed, query, key, batch_head, stream, last_dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tells which probabilities of queries ``[BLOCK_M]`` and keys ``[BLOCK_N]`` at any positions dropout keeps."""
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, (key // 4)[None, :] + zeros, query[:, None] + zeros, batch_head + zeros, zeros + stream
    )
    lane = (key % 4)[None, :]
    low, high = tl.where(lane == 0, lane_0, lane_1), tl.where(lane == 2, lane_2, lane_3)
    return tl.where(lane < 2, low, high) > last_dropped
