"""Banded attention, backward: dq by query tiles, dk and dv by key tiles, and those of the global keys in two stages.

Probabilities are recomputed from lse, which is +inf on rows without a result: theirs are 0. Tiles are split as in the
forward; where a program's columns hold padding, all its tiles are masked. The dq kernel runs first and also writes
``delta``, the row sums of ``out * d_out``, for the others. Dropout's keep_scale is applied once, at the end: until
there d_out goes without it, and delta is divided by it.

The rows of dk and dv at global tokens come from all local queries: each of several splits of the queries is summed by
one program, then the splits in a fixed order, which overwrites what the band's kernel left in those rows.

Source: Dao, "FlashAttention-2", 2023, algorithm 2, without its atomics: dq has a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from led_kernels.backends._results import new_gradients
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.launch import (
    block_arguments,
    compiler_arguments,
    global_block,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    window_arguments,
)
from led_kernels.backends.triton.primitives import (
    LOG2_E,
    SIZES,
    band_tiles,
    count_padding,
    has_global,
    is_between,
    is_token,
    keep_of_block,
    keep_of_keys,
    load_rows,
    locate_sequence,
    store_rows,
)
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask

_QUERIES_IN_SPLIT = 256
_SPLITS_IN_TILE = 32


@triton.jit
def _pointer_to(ptr, batch, row, head, stride_b, stride_s, stride_h):
    """Where a row of one head of ``[batch, rows, heads, head_dim]`` starts."""
    return ptr + batch.to(tl.int64) * stride_b + row * stride_s + head.to(tl.int64) * stride_h


@triton.jit
def _load_tile(ptr, stride_s, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows from the pointer on, ``[len(rows_exist), BLOCK_D]``; zeros where none exist."""
    offsets = tl.arange(0, rows_exist.shape[0])[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]
    return load_rows(ptr, offsets, rows_exist, HEAD_DIM, BLOCK_D, True)


@triton.jit
def _store_tile(ptr, stride_s, x, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``x`` ``[len(rows_exist), BLOCK_D]`` to the rows from the pointer on that exist."""
    offsets = tl.arange(0, rows_exist.shape[0])[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]
    store_rows(ptr, offsets, x, rows_exist, HEAD_DIM, BLOCK_D)


@triton.jit
def _differentiate_tile(
    q_or_k, k_or_q, d_out_or_v, v_or_d_out, lse, delta, allowed, keep, qk_scale, PRECISION: tl.constexpr
):
    """Of one tile, ``[queries, keys]`` or, with the arguments swapped, ``[keys, queries]``.

    Args:
        lse, delta: of the queries, ``[queries, 1]`` or ``[1, queries]``; lse in units of log2.
        allowed, keep: what the mask and dropout keep, None for everything.

    Returns:
        The probabilities after dropout, and d(scores) without softmax_scale; both without keep_scale.
    """
    scores = tl.dot(q_or_k, tl.trans(k_or_q), input_precision=PRECISION)
    p = tl.math.exp2(scores * qk_scale - lse)
    if allowed is not None:
        p = tl.where(allowed, p, 0.0)
    dp = tl.dot(d_out_or_v, tl.trans(v_or_d_out), input_precision=PRECISION)
    p_kept = p
    if keep is not None:
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp, 0.0)
    return p_kept, p * (dp - delta)


@triton.jit
def _dq_of_globals(
    dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
    global_index_ptr, num_globals, lower, upper, qk_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq plus what the global keys outside each query's band add."""
    slot = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    for start in tl.range(0, num_globals, BLOCK_G, num_stages=1):
        exists = start + slot < num_globals
        key = tl.load(global_index_ptr + start + slot, mask=exists, other=0)  # [BLOCK_G]
        row = key.to(tl.int64)[:, None]
        k = load_rows(k_ptr, row * k_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_ptr, row * v_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
        outside = ~is_between(key, lower, upper)
        keep = None
        if DROPOUT:
            keep = keep_of_keys(seed, query, key, batch_head, 0, last_dropped, BLOCK_M, BLOCK_G)
        _, d_scores = _differentiate_tile(
            q, k, d_out, v, lse[:, None], delta[:, None], exists[None, :] & outside, keep, qk_scale, PRECISION
        )  # [BLOCK_M, BLOCK_G]
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_of_band(
    dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
    start, num_tiles, gap_at, gap, lower, upper, qk_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_EDGES: tl.constexpr, CHECK_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dq plus what ``num_tiles`` key tiles from ``start`` on add; tile ``gap_at`` follows a gap of ``gap``."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k_offsets = offs_n[:, None] * k_stride_s + offs_d[None, :]
    v_offsets = offs_n[:, None] * v_stride_s + offs_d[None, :]
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        tile = i
        if CHECK_EDGES:
            tile = tl.where(i < gap_at, i, i + gap)
        key_start = start + tile * BLOCK_N
        key = key_start + offs_n  # [BLOCK_N]
        exists = key < length
        if CHECK_PADDING:
            exists = is_token(padding_before_ptr, key, length)
        row = key_start.to(tl.int64)
        k = load_rows(k_ptr + row * k_stride_s, k_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_EDGES)
        v = load_rows(v_ptr + row * v_stride_s, v_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_EDGES)
        allowed = None
        if CHECK_EDGES:
            allowed = is_between(key, lower, upper)
            if CHECK_PADDING:
                allowed = allowed & exists[None, :]
        keep = None
        if DROPOUT:
            keep = keep_of_block(seed, query, key_start, batch_head, 0, last_dropped, BLOCK_M, BLOCK_N)
        _, d_scores = _differentiate_tile(
            q, k, d_out, v, lse[:, None], delta[:, None], allowed, keep, qk_scale, PRECISION
        )  # [BLOCK_M, BLOCK_N]
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _banded_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dq_ptr, lse_ptr, d_lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dq_stride_b, dq_stride_s, dq_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, window_left, window_right, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    row_start = tl.program_id(0) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if row_start >= num_rows:
        return
    tile_row = first_row + row_start
    query = row_start + tl.arange(0, BLOCK_M)
    lse_row = batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + first_row
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if row_start >= length:  # only padding from here on
        dq_ptr = _pointer_to(dq_ptr, batch, tile_row, head, dq_stride_b, dq_stride_s, dq_stride_h)
        _store_tile(dq_ptr, dq_stride_s, dq, query < num_rows, HEAD_DIM, BLOCK_D)
        tl.store(delta_ptr + lse_row + query, 0.0, mask=query < num_rows)
        return

    q_ptr = _pointer_to(q_ptr, batch, tile_row, head, q_stride_b, q_stride_s, q_stride_h)
    out_ptr = _pointer_to(out_ptr, batch, tile_row, head, out_stride_b, out_stride_s, out_stride_h)
    d_out_ptr = _pointer_to(d_out_ptr, batch, tile_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    k_ptr = _pointer_to(k_ptr, batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr = _pointer_to(v_ptr, batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    lse = tl.load(lse_ptr + lse_row + query, mask=query < length, other=float("inf"))
    is_local = lse < float("inf")
    # other rows come in as zeros, so that they have a delta and a dq of 0
    q = _load_tile(q_ptr, q_stride_s, is_local, HEAD_DIM, BLOCK_D)
    out = _load_tile(out_ptr, out_stride_s, is_local, HEAD_DIM, BLOCK_D)
    d_out = _load_tile(d_out_ptr, d_out_stride_s, is_local, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + lse_row + query, mask=is_local, other=0.0)
    delta /= keep_scale
    tl.store(delta_ptr + lse_row + query, delta, mask=query < num_rows)

    lse *= LOG2_E
    qk_scale = softmax_scale * LOG2_E
    lower, upper = query - window_left, tl.minimum(query + window_right, length - 1)  # the band of each query
    batch_head = batch * heads + head
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dq = _dq_of_globals(
        dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
        global_index_ptr + batch * max_globals, tl.load(num_globals_ptr + batch), lower, query + window_right,
        qk_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, DROPOUT, PRECISION,
    )  # fmt: skip
    start, stop, num_tiles, num_left, num_interior = band_tiles(
        row_start, length, window_left, window_right, BLOCK_M, BLOCK_N
    )
    if count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) == 0:
        dq = _dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, stop,
            start, num_tiles - num_interior, num_left, num_interior, lower, upper,
            qk_scale, seed, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
        dq = _dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, length,
            start + num_left * BLOCK_N, num_interior, 0, 0, lower, upper,
            qk_scale, seed, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
    else:
        dq = _dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, length,
            start, num_tiles, 0, 0, lower, upper,
            qk_scale, seed, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, True, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
    dq_ptr = _pointer_to(dq_ptr, batch, tile_row, head, dq_stride_b, dq_stride_s, dq_stride_h)
    _store_tile(dq_ptr, dq_stride_s, dq * (softmax_scale * keep_scale), query < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_of_band(
    dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
    start, num_tiles, gap_at, gap, lower, upper, qk_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_EDGES: tl.constexpr, CHECK_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv plus what ``num_tiles`` query tiles from ``start`` on add; tile ``gap_at`` follows a gap of ``gap``."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    q_offsets = offs_m[:, None] * q_stride_s + offs_d[None, :]
    d_out_offsets = offs_m[:, None] * d_out_stride_s + offs_d[None, :]
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        tile = i
        if CHECK_EDGES:
            tile = tl.where(i < gap_at, i, i + gap)
        query_start = start + tile * BLOCK_M
        query = query_start + offs_m  # [BLOCK_M]
        exists = query < length
        if CHECK_EDGES:
            lse = tl.load(lse_ptr + query, mask=exists, other=0.0)
            delta = tl.load(delta_ptr + query, mask=exists, other=0.0)
        else:
            lse = tl.load(lse_ptr + query)
            delta = tl.load(delta_ptr + query)
        if CHECK_PADDING:
            exists = exists & (lse < float("inf"))
        row = query_start.to(tl.int64)
        q = load_rows(q_ptr + row * q_stride_s, q_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_EDGES)
        d_out = load_rows(
            d_out_ptr + row * d_out_stride_s, d_out_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_EDGES
        )
        allowed = None
        if CHECK_EDGES:
            allowed = is_between(query, lower, upper)
        keep = None
        if DROPOUT:
            keep = tl.trans(
                keep_of_block(seed, query, key_start, batch_head, 0, last_dropped, BLOCK_M, BLOCK_N)
            )
        p, d_scores = _differentiate_tile(
            k, q, v, d_out, lse[None, :] * LOG2_E, delta[None, :], allowed, keep, qk_scale, PRECISION
        )  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _banded_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    d_out_stride_b, d_out_stride_s, d_out_stride_h, dk_stride_b, dk_stride_s, dk_stride_h,
    dv_stride_b, dv_stride_s, dv_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, window_left, window_right, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    key_start = tl.program_id(0) * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if key_start >= num_rows:
        return
    tile_row = first_row + key_start
    key = key_start + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if key_start < length:  # behind that there is only padding
        q_ptr = _pointer_to(q_ptr, batch, first_row, head, q_stride_b, q_stride_s, q_stride_h)
        d_out_ptr = _pointer_to(
            d_out_ptr, batch, first_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h
        )
        k_ptr = _pointer_to(k_ptr, batch, tile_row, head, k_stride_b, k_stride_s, k_stride_h)
        v_ptr = _pointer_to(v_ptr, batch, tile_row, head, v_stride_b, v_stride_s, v_stride_h)
        k = _load_tile(k_ptr, k_stride_s, key < length, HEAD_DIM, BLOCK_D)
        v = _load_tile(v_ptr, v_stride_s, key < length, HEAD_DIM, BLOCK_D)
        lse_row = batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + first_row
        lse_ptr += lse_row
        delta_ptr += lse_row
        qk_scale = softmax_scale * LOG2_E
        # the queries that see each key
        lower, upper = key - window_right, tl.minimum(key + window_left, length - 1)
        batch_head = batch * heads + head
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_ptr)
        start, stop, num_tiles, num_left, num_interior = band_tiles(
            key_start, length, window_right, window_left, BLOCK_N, BLOCK_M
        )
        # p is 0 on rows without a result, but what their d_out holds need not be finite
        has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) > 0
        globals_ptr = global_index_ptr + batch * max_globals
        if not (has_padding | has_global(globals_ptr, tl.load(num_globals_ptr + batch), start, stop)):
            dk, dv = _dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, stop,
                start, num_tiles - num_interior, num_left, num_interior, lower, upper,
                qk_scale, seed, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
            dk, dv = _dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
                start + num_left * BLOCK_M, num_interior, 0, 0, lower, upper,
                qk_scale, seed, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
        else:
            dk, dv = _dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
                start, num_tiles, 0, 0, lower, upper,
                qk_scale, seed, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, True, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
        exists = is_token(padding_before_ptr + mask_row, key, length)[:, None]
        dk = tl.where(exists, dk * (softmax_scale * keep_scale), 0.0)  # selects: rows of padding may hold NaN
        dv = tl.where(exists, dv * keep_scale, 0.0)
    dk_ptr = _pointer_to(dk_ptr, batch, tile_row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr = _pointer_to(dv_ptr, batch, tile_row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    _store_tile(dk_ptr, dk_stride_s, dk, key < num_rows, HEAD_DIM, BLOCK_D)
    _store_tile(dv_ptr, dv_stride_s, dv, key < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "queries_in_split"))
def _banded_dkdv_globals_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, partial_dk_ptr, partial_dv_ptr, lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    d_out_stride_b, d_out_stride_s, d_out_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, queries_in_split, softmax_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """What one split of the local queries adds to dk, dv of a tile of global keys: fp32, without the scales."""
    num_global_tiles = tl.cdiv(max_globals, BLOCK_N)
    split, global_tile = tl.program_id(0) // num_global_tiles, tl.program_id(0) % num_global_tiles
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, _, length, _ = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_globals = tl.load(num_globals_ptr + batch)
    start = split * queries_in_split
    if (start >= length) | (global_tile * BLOCK_N >= num_globals):
        return
    q_ptr = _pointer_to(q_ptr, batch, first_row, head, q_stride_b, q_stride_s, q_stride_h)
    d_out_ptr = _pointer_to(d_out_ptr, batch, first_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    k_ptr = _pointer_to(k_ptr, batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr = _pointer_to(v_ptr, batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    lse_row = batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + first_row
    lse_ptr += lse_row
    delta_ptr += lse_row
    offs_d = tl.arange(0, BLOCK_D)
    slot = global_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = slot < num_globals
    key = tl.load(global_index_ptr + batch * max_globals + slot, mask=exists, other=0)  # [BLOCK_N]
    key_row = key.to(tl.int64)[:, None]
    k = load_rows(k_ptr, key_row * k_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, key_row * v_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
    qk_scale = softmax_scale * LOG2_E
    batch_head = batch * heads + head
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offs_m = tl.arange(0, BLOCK_M)
    q_offsets = offs_m[:, None] * q_stride_s + offs_d[None, :]
    d_out_offsets = offs_m[:, None] * d_out_stride_s + offs_d[None, :]
    stop = tl.minimum(start + queries_in_split, length)
    for i in tl.range(0, tl.cdiv(stop - start, BLOCK_M), num_stages=NUM_STAGES):
        query_start = start + i * BLOCK_M
        query = query_start + offs_m  # [BLOCK_M]
        lse = tl.load(lse_ptr + query, mask=query < stop, other=float("inf"))
        delta = tl.load(delta_ptr + query, mask=query < stop, other=0.0)
        is_local = lse < float("inf")
        row = query_start.to(tl.int64)
        q = load_rows(q_ptr + row * q_stride_s, q_offsets, is_local, HEAD_DIM, BLOCK_D, True)
        d_out = load_rows(d_out_ptr + row * d_out_stride_s, d_out_offsets, is_local, HEAD_DIM, BLOCK_D, True)
        keep = None
        if DROPOUT:
            keep = tl.trans(keep_of_keys(seed, query, key, batch_head, 0, last_dropped, BLOCK_M, BLOCK_N))
        p, d_scores = _differentiate_tile(
            k, q, v, d_out, lse[None, :] * LOG2_E, delta[None, :], None, keep, qk_scale, PRECISION
        )  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)

    # [splits, batch, max_globals, heads, HEAD_DIM]
    partial_row = ((split * tl.num_programs(2) + batch).to(tl.int64) * max_globals + slot) * heads + head
    offsets = partial_row[:, None] * HEAD_DIM + offs_d[None, :]
    store_rows(partial_dk_ptr, offsets, dk, exists, HEAD_DIM, BLOCK_D)
    store_rows(partial_dv_ptr, offsets, dv, exists, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "queries_in_split"))
def _sum_splits_kernel(
    partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr, seq_start_ptr, seq_len_ptr, global_index_ptr, num_globals_ptr,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h, mask_stride_b,
    max_globals, queries_in_split, softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one global key and head."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if slot >= tl.load(num_globals_ptr + batch):
        return
    first_row, _, length, _ = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    dk = tl.zeros([BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_D], tl.float32)
    num_splits = tl.cdiv(length, queries_in_split)
    for start in range(0, num_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        row = (split * tl.num_programs(2) + batch).to(tl.int64) * max_globals + slot
        offsets = (row * tl.num_programs(1) + head)[:, None] * HEAD_DIM + offs_d[None, :]
        exists = split < num_splits
        dk += tl.sum(load_rows(partial_dk_ptr, offsets, exists, HEAD_DIM, BLOCK_D, True), 0)
        dv += tl.sum(load_rows(partial_dv_ptr, offsets, exists, HEAD_DIM, BLOCK_D, True), 0)
    row = first_row + tl.load(global_index_ptr + batch * max_globals + slot)
    dk_ptr = _pointer_to(dk_ptr, batch, row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr = _pointer_to(dv_ptr, batch, row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    tl.store(dk_ptr + offs_d, (dk * (softmax_scale * keep_scale)).to(dk_ptr.dtype.element_ty), mask=in_head)
    tl.store(dv_ptr + offs_d, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=in_head)


def launch_banded_backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of banded attention -> dq, dk, dv; softmax_scale is above 0."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    lse = lse.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    dq, dk, dv = new_gradients(call, mask.is_packed)
    arguments = {
        **sequence_arguments(mask, q=q, k=k, v=v, out=out, d_out=d_out, dq=dq, dk=dk, dv=dv),
        **lse_arguments(lse=lse, d_lse=d_lse, delta=torch.empty_like(lse)),
        **softmax_arguments(call),
        **window_arguments(call),
        "heads": call.heads,
    }
    config = configs.choose("banded_dq", q.dtype, call.head_dim, call.dropout_p)
    arguments |= block_arguments(config, q) | {"BLOCK_G": global_block(mask.max_globals)}
    grid = (triton.cdiv(mask.max_seqlen, config.block_m), call.heads, mask.batch)
    _banded_dq_kernel[grid](**_taken_by(_banded_dq_kernel, arguments))

    config = configs.choose("banded_dkdv", q.dtype, call.head_dim, call.dropout_p)
    arguments |= block_arguments(config, q)
    grid = (triton.cdiv(mask.max_seqlen, config.block_n), call.heads, mask.batch)
    _banded_dkdv_kernel[grid](**_taken_by(_banded_dkdv_kernel, arguments))
    if mask.max_globals > 0 and q.numel() > 0:
        _launch_dkdv_of_globals(arguments, q, mask)
    return dq, dk, dv


def _launch_dkdv_of_globals(arguments: dict[str, object], q: Tensor, mask: LongformerMask) -> None:
    """Overwrites the rows of dk and dv at global tokens.

    The partial sums take as many rows as q has at most, or those of one split where the global tokens are more.
    """
    heads, head_dim = q.shape[-2:]
    config = configs.choose("banded_dkdv_globals", q.dtype, head_dim)
    rows = q.numel() // (heads * head_dim)
    most_splits = max(1, rows // (mask.batch * mask.max_globals))
    num_splits = min(triton.cdiv(mask.max_seqlen, _QUERIES_IN_SPLIT), most_splits)
    shape = (num_splits, mask.batch, mask.max_globals, heads, head_dim)
    block_n = global_block(mask.max_globals)
    arguments |= block_arguments(config, q) | {
        "partial_dk_ptr": torch.empty(shape, dtype=torch.float32, device=q.device),
        "partial_dv_ptr": torch.empty(shape, dtype=torch.float32, device=q.device),
        "queries_in_split": triton.cdiv(mask.max_seqlen, num_splits * config.block_m) * config.block_m,
        "BLOCK_N": block_n,
    }
    grid = (num_splits * triton.cdiv(mask.max_globals, block_n), heads, mask.batch)
    _banded_dkdv_globals_kernel[grid](**_taken_by(_banded_dkdv_globals_kernel, arguments))
    grid = (mask.max_globals, heads, mask.batch)
    _sum_splits_kernel[grid](**_taken_by(_sum_splits_kernel, arguments), BLOCK_SPLITS=_SPLITS_IN_TILE)


def _taken_by(kernel: triton.JITFunction, arguments: dict[str, object]) -> dict[str, object]:
    """Those of the arguments that the kernel has parameters for, and its launch options."""
    names = {*kernel.arg_names, "num_warps", *compiler_arguments()}
    return {name: x for name, x in arguments.items() if name in names}
