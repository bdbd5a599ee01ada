"""Small Triton kernels whose machine code is known to be good or bad in one way, for tests of the gate itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEAD_DIM, BLOCK_M, BLOCK_N = 64, 128, 64


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, first, last, query, width,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    for tile in range(first, last):
        key = tile * BLOCK_N + offs_n
        k = tl.load(k_ptr + key[:, None] * HEAD_DIM + offs_d[None, :])
        v = tl.load(v_ptr + key[:, None] * HEAD_DIM + offs_d[None, :])
        scores = tl.dot(q, tl.trans(k))
        if MASKED:
            scores = tl.where(tl.abs(query[:, None] - key[None, :]) <= width, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.math.exp2(scores - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        row_sum, row_max = row_sum * rescale + tl.sum(p, 1), new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=("num_masked", "width"))
def two_loops_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, num_interior_ptr, num_masked, width,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_ALL: tl.constexpr,
):  # fmt: skip
    """Program i attends to ``num_masked`` masked tiles, then to ``num_interior[i]`` others."""
    program = tl.program_id(0)
    query, offs_d = program * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    offsets = query[:, None] * HEAD_DIM + offs_d[None, :]
    q = tl.load(q_ptr + offsets)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, 0, num_masked, query, width, HEAD_DIM, BLOCK_N, True
    )
    last = num_masked + tl.load(num_interior_ptr + program)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, num_masked, last, query, width, HEAD_DIM, BLOCK_N, MASK_ALL
    )
    tl.store(out_ptr + offsets, (acc / row_sum[:, None]).to(q.dtype))


def launch_two_loops(
    num_masked: int, num_interior: list[int], num_warps: int = 8, mask_all: bool = False
) -> None:
    """Launches one program for each entry of ``num_interior``."""
    q, out = (torch.zeros(len(num_interior) * BLOCK_M, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    k, v = (
        torch.zeros((num_masked + max(num_interior)) * BLOCK_N, HEAD_DIM, dtype=torch.bfloat16)
        for _ in range(2)
    )
    counts = torch.tensor(num_interior, dtype=torch.int32)
    two_loops_kernel[(len(num_interior),)](
        q, k, v, out, counts, num_masked, 32,
        HEAD_DIM, BLOCK_M, BLOCK_N, mask_all, num_warps=num_warps, num_stages=2,
    )  # fmt: skip


@triton.jit
def add_one_kernel(x_ptr, out_ptr, size, scale, BLOCK: tl.constexpr, WITH_SCALE: tl.constexpr = False):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    if WITH_SCALE:
        x *= scale
    tl.store(out_ptr + offsets, x + 1, mask=offsets < size)
