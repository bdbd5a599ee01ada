"""These functions compute the softmax of a tile of queries over tiles of keys, and the gradients of its scores.

Scores are kept in units of log2, so that the exponential is one ``ex2`` and the scale folds into one FMA.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The running maximum of a query that has seen no key: finite, so that no difference of maxima is inf - inf.
NO_KEY = tl.constexpr(-3.0e38)


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns acc ``[BLOCK_M, BLOCK_D]``, row_sum and row_max ``[BLOCK_M]`` of queries that have seen no key."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], NO_KEY, tl.float32)
    return acc, row_sum, row_max


@triton.jit
def online_softmax_update(scores, acc, row_sum, row_max, qk_scale):
    """Takes one step of the online softmax over the keys of ``scores``, which are -inf where a key is not visible.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Returns:
        probabilities (relative to the new maximum), and acc, row_sum, row_max brought up to date.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
    p = tl.math.exp2(scores * qk_scale - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    return p, acc * rescale[:, None], row_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def attend_tile(acc, row_sum, row_max, scores, v, keep, qk_scale, PRECISION: tl.constexpr):
    """Takes the tile of keys with these scores (-inf where a key is not visible) and v into the running softmax.

    Args:
        keep: the probabilities that dropout keeps, None where it keeps all.
    """
    p, acc, row_sum, row_max = online_softmax_update(scores, acc, row_sum, row_max, qk_scale)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), row_sum, row_max


@triton.jit
def log_sum_exp(row_sum, row_max):
    """Returns the lse of queries whose running softmax has seen all keys; -inf where none was visible."""
    return (row_max + tl.math.log2(row_sum)) * LN_2


@triton.jit
def differentiate_tile(
    q_or_k, k_or_q, d_out_or_v, v_or_d_out, lse, delta, visible, keep, keep_scale, qk_scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of a tile's scores, ``[queries, keys]`` or, with operands swapped, ``[keys, queries]``.

    Args:
        lse, delta: those of the queries, ``[queries, 1]`` or ``[1, queries]``; lse in units of log2.
        visible: the pairs that the mask allows, None in an interior tile.
        keep: the probabilities that dropout keeps, None where it keeps all.
        keep_scale: the factor of what dropout keeps in the product of d_out and v; 1 if delta was divided by it.

    Returns:
        The probabilities after dropout, without keep_scale; and the gradients of the scores, without softmax_scale.
    """
    scores = tl.dot(q_or_k, tl.trans(k_or_q), input_precision=PRECISION)
    p = tl.math.exp2(scores * qk_scale - lse)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(d_out_or_v, tl.trans(v_or_d_out), input_precision=PRECISION)
    p_kept = p
    if keep is not None:
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p_kept, p * (dp - delta)
