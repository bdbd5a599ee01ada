"""Instructions of whole warps: shuffles, reductions, ldmatrix and mma, on ``[warps * 32]`` lanes in order.

The layouts are those of the PTX manual's figures ("Matrix Fragments for mma.m16n8k16", "ldmatrix").
"""

from __future__ import annotations

import numpy as np

WARP = 32
_LANE = np.arange(WARP)


def shuffle_source(mode: str, lane_operand: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``shfl.sync`` -> (lane of the wave to read from, whether it is in range), [lanes]

    Args:
        mode: ``up``, ``down``, ``bfly`` or ``idx``.
        lane_operand: uint32, [lanes], ``b`` of the manual.
        clamp: uint32, [lanes], ``c``: bits 0-4 the clamp value, bits 8-12 the mask that splits the warp into segments.
    """
    lane = np.resize(_LANE, len(lane_operand))
    value, clamp = lane_operand.astype(np.int64) & 31, clamp.astype(np.int64)
    segment, limit = clamp >> 8 & 31, clamp & 31
    last, first = (lane & segment) | (limit & ~segment), lane & segment
    source = {
        "up": lane - value,
        "down": lane + value,
        "bfly": lane ^ value,
        "idx": first | (value & ~segment),
    }[mode]
    in_range = source >= last if mode == "up" else source <= last
    return np.arange(len(lane)) - lane + np.where(in_range, source, lane), in_range


def reduce_warps(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    """``redux.sync``: every lane gets the warp's result."""
    return np.repeat(function.reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype), WARP)


def distribute_matrices(rows: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
    """``ldmatrix``: ``count`` 8x8 matrices of 16 bits a warp -> uint32 [lanes] for each

    Args:
        rows: uint8 [warps * 8 count, 16], the rows of the matrices in the order of the lanes that gave their addresses.
    """
    matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
    if transposed:
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
    pairs = matrices.view(np.uint32)  # [warps, count, 8, 4]
    return [pairs[:, i].reshape(-1) for i in range(count)]


def multiply_accumulate(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """``mma.m16n8k*`` on fragments: ``D = A B + C``, products and sums in fp32

    Args:
        a: 2 or 4 registers, fp32 values ``[lanes]`` (tf32) or ``[lanes, 2]`` (fp16, bf16): rows ``g`` and ``g + 8``
            of the first columns, then of the second ones, where ``g = lane // 4``.
        b: half as many, of the column ``g``.
        c: 4 registers, fp32 ``[lanes]``: two columns of row ``g``, two of row ``g + 8``.
    """
    matrix_a = _unpack(a).reshape(len(a) // 2, 2, -1, 8, a[0].size // a[0].shape[0] * 4)
    matrix_b = _unpack(b)  # [halves of k, warps, n, k of a half]
    matrix_a = matrix_a.transpose(
        2, 1, 3, 0, 4
    )  # [warps, halves of m, m of a half, halves of k, k of a half]
    warps = matrix_a.shape[0]
    matrix_a = matrix_a.reshape(warps, 16, -1)
    matrix_b = matrix_b.transpose(1, 2, 0, 3).reshape(warps, 8, -1)
    product = matrix_a @ matrix_b.swapaxes(1, 2)  # [warps, 16, 8]
    product = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [x + y for x, y in zip(product, c, strict=True)]


def _unpack(registers: list[np.ndarray]) -> np.ndarray:
    """[registers, warps, g, k of a half]: the four lanes of a group hold neighboring k"""
    values = np.stack(registers)
    return values.reshape(len(registers), -1, 8, values.size // len(registers) // (values.shape[1] // 4))
