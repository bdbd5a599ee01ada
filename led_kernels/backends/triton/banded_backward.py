"""Banded attention's backward goes by query tiles for dq, by key tiles for dk and dv, by two stages for global keys.

Probabilities are recomputed from lse, which is +inf on rows without a result, so that those have probabilities of 0.
Tiles are interior or masked ones as in the forward; where the tiles of a program hold padding, or those of dk and dv
other queries than local ones, all are masked. The dq
kernel runs first and also writes ``delta``, the row sums of ``out * d_out``, for the others. Dropout's keep_scale is
applied once, to the finished gradients: until then d_out goes without it, and delta is divided by it.

The rows of dk and dv at global tokens come from all local queries: one program sums over each split of the queries,
then another kernel adds up the splits, in a fixed order, and overwrites what the band's kernel left in those rows.

Source: Dao, "FlashAttention-2", 2023, algorithm 2, without its atomics: dq has a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from led_kernels.backends._results import new_gradients
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.dropout import BANDED_STREAM, keep_of_global_keys, keep_of_tile
from led_kernels.backends.triton.launch import (
    SIZES,
    block_arguments,
    global_key_block,
    launch,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    window_arguments,
)
from led_kernels.backends.triton.mask import (
    band_mask,
    band_tiles,
    count_local,
    count_padding,
    is_between,
    is_token,
    key_exists,
    load_global_positions,
    locate_sequence,
    tile_around_gap,
)
from led_kernels.backends.triton.softmax import LOG2_E, differentiate_tile
from led_kernels.backends.triton.splits import sum_splits
from led_kernels.backends.triton.tiles import (
    load_global_keys,
    load_queries,
    load_tile,
    row_offset,
    store_row,
    store_rows,
    store_tile,
)
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask

_QUERIES_PER_SPLIT = 256
_BLOCK_SPLITS = 32  # that are summed at a time
_KINDS_AT_ONCE = tl.constexpr(512)  # of token_kind that are looked at


@triton.jit
def _accumulate_dq_of_global_keys(
    dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
    global_index_ptr, global_position_ptr, num_globals, lower, upper,
    qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq what the global keys outside each query's band, ``lower … upper``, contribute."""
    for start in tl.range(0, num_globals, BLOCK_G, num_stages=1):
        slot = start + tl.arange(0, BLOCK_G)
        key, exists, k, v = load_global_keys(
            slot, global_index_ptr, num_globals, k_ptr, v_ptr, k_stride_s, v_stride_s, HEAD_DIM, BLOCK_D
        )
        visible = exists[None, :] & ~is_between(key, lower, upper)
        keep = None
        if DROPOUT:
            position = load_global_positions(global_position_ptr, slot, num_globals)
            keep = keep_of_global_keys(
                seed,
                query + position_offset,
                position,
                batch_head,
                BANDED_STREAM,
                last_dropped,
                BLOCK_M,
                BLOCK_G,
            )
        _, d_scores = differentiate_tile(
            q, k, d_out, v, lse[:, None], delta[:, None], visible, keep, 1.0, qk_scale, PRECISION
        )  # [BLOCK_M, BLOCK_G]
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _accumulate_dq_of_band(
    dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
    start, num_tiles, gap_at, gap, lower, upper, qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dq what ``num_tiles`` tiles of keys from ``start`` on contribute.

    Before tile ``gap_at`` of them ``gap`` tiles are passed over. The other arguments are those of the forward's walk
    over the band.
    """
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        tile = i
        if IS_MASKED:
            tile = tile_around_gap(i, gap_at, gap)
        key_start = start + tile * BLOCK_N
        key = key_start + tl.arange(0, BLOCK_N)
        exists = key_exists(padding_before_ptr, key, length, HAS_PADDING)
        row = key_start.to(tl.int64)
        k = load_tile(k_ptr + row * k_stride_s, k_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        v = load_tile(v_ptr + row * v_stride_s, v_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        visible = None
        if IS_MASKED:
            visible = band_mask(key, exists, lower, upper, HAS_PADDING)
        keep = None
        if DROPOUT:
            keep = keep_of_tile(
                seed, query + position_offset, key_start + position_offset, batch_head, BANDED_STREAM, last_dropped,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        _, d_scores = differentiate_tile(
            q, k, d_out, v, lse[:, None], delta[:, None], visible, keep, 1.0, qk_scale, PRECISION
        )  # [BLOCK_M, BLOCK_N]
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _banded_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dq_ptr, lse_ptr, d_lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr,
    position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dq_stride_b, dq_stride_s, dq_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, window_left, window_right, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dq and delta of a tile of queries.

    Tiles have ``BLOCK_N`` keys of the band or ``BLOCK_G`` global keys.
    """
    query_start = tl.program_id(0) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if query_start >= num_rows:
        return
    tile_row = first_row + query_start
    query = query_start + tl.arange(0, BLOCK_M)
    lse_row = row_offset(batch, first_row, head, lse_stride_b, 1, lse_stride_h)
    dq_ptr += row_offset(batch, tile_row, head, dq_stride_b, dq_stride_s, dq_stride_h)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lse = tl.load(lse_ptr + lse_row + query, mask=query < length, other=float("inf"))
    if tl.max((lse != float("inf")).to(tl.int32), 0) == 0:  # no row has a result
        store_tile(dq_ptr, dq_stride_s, dq, query < num_rows, HEAD_DIM, BLOCK_D)
        tl.store(delta_ptr + lse_row + query, 0.0, mask=query < num_rows)
        return

    q_ptr += row_offset(batch, tile_row, head, q_stride_b, q_stride_s, q_stride_h)
    out_ptr += row_offset(batch, tile_row, head, out_stride_b, out_stride_s, out_stride_h)
    d_out_ptr += row_offset(batch, tile_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    k_ptr += row_offset(batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    # rows without a result come in as zeros, so that their delta and dq are 0
    q, d_out, delta = load_queries(
        q_ptr, out_ptr, d_out_ptr, d_lse_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_row + query,
        lse < float("inf"), HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    delta /= keep_scale
    tl.store(delta_ptr + lse_row + query, delta, mask=query < num_rows)

    lse *= LOG2_E
    qk_scale = softmax_scale * LOG2_E
    lower, upper = query - window_left, tl.minimum(query + window_right, length - 1)  # the band of each query
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    dq = _accumulate_dq_of_global_keys(
        dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
        global_index_ptr + batch * max_globals, global_position_ptr + batch * max_globals,
        tl.load(num_globals_ptr + batch), lower, query + window_right,
        qk_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, DROPOUT, PRECISION,
    )  # fmt: skip
    start, stop, num_tiles, num_left, num_interior = band_tiles(
        query_start, length, window_left, window_right, BLOCK_M, BLOCK_N
    )
    if count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) == 0:
        dq = _accumulate_dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, stop,
            start, num_tiles - num_interior, num_left, num_interior, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
        dq = _accumulate_dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, length,
            start + num_left * BLOCK_N, num_interior, 0, 0, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
    else:
        dq = _accumulate_dq_of_band(
            dq, q, d_out, lse, delta, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
            padding_before_ptr + mask_row, length,
            start, num_tiles, 0, 0, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, True, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
    store_tile(dq_ptr, dq_stride_s, dq * (softmax_scale * keep_scale), query < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit
def _accumulate_dkdv_of_band(
    dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
    start, num_tiles, gap_at, gap, lower, upper, qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv of a tile of keys what ``num_tiles`` tiles of queries from ``start`` on contribute.

    Before tile ``gap_at`` of them ``gap`` tiles are passed over. ``lower … upper`` are the queries that see each key.
    """
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        tile = i
        if IS_MASKED:
            tile = tile_around_gap(i, gap_at, gap)
        query_start = start + tile * BLOCK_M
        query = query_start + tl.arange(0, BLOCK_M)
        exists = query < length
        if IS_MASKED:
            lse = tl.load(lse_ptr + query, mask=exists, other=0.0)
            delta = tl.load(delta_ptr + query, mask=exists, other=0.0)
        else:
            lse = tl.load(lse_ptr + query)
            delta = tl.load(delta_ptr + query)
        if HAS_PADDING:
            exists = exists & (lse < float("inf"))
        row = query_start.to(tl.int64)
        q = load_tile(q_ptr + row * q_stride_s, q_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        d_out = load_tile(
            d_out_ptr + row * d_out_stride_s, d_out_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED
        )
        visible = None
        if IS_MASKED:
            visible = is_between(query, lower, upper)
        keep = None
        if DROPOUT:
            keep = keep_of_tile(
                seed, query + position_offset, key_start + position_offset, batch_head, BANDED_STREAM, last_dropped,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            keep = tl.trans(keep)
        p, d_scores = differentiate_tile(
            k, q, v, d_out, lse[None, :] * LOG2_E, delta[None, :], visible, keep, 1.0, qk_scale, PRECISION
        )  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _banded_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, position_offset_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    d_out_stride_b, d_out_stride_s, d_out_stride_h, dk_stride_b, dk_stride_s, dk_stride_h,
    dv_stride_b, dv_stride_s, dv_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, window_left, window_right, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of a tile of keys, from the queries whose band holds them."""
    key_start = tl.program_id(0) * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if key_start >= num_rows:
        return
    tile_row = first_row + key_start
    key = key_start + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if key_start < length:  # else the whole tile is padding
        q_ptr += row_offset(batch, first_row, head, q_stride_b, q_stride_s, q_stride_h)
        d_out_ptr += row_offset(batch, first_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
        k_ptr += row_offset(batch, tile_row, head, k_stride_b, k_stride_s, k_stride_h)
        v_ptr += row_offset(batch, tile_row, head, v_stride_b, v_stride_s, v_stride_h)
        k = load_tile(k_ptr, k_stride_s, key < length, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_ptr, v_stride_s, key < length, HEAD_DIM, BLOCK_D, True)
        lse_row = row_offset(batch, first_row, head, lse_stride_b, 1, lse_stride_h)
        lse_ptr += lse_row
        delta_ptr += lse_row
        qk_scale = softmax_scale * LOG2_E
        # the queries that see each key
        lower, upper = key - window_right, tl.minimum(key + window_left, length - 1)
        batch_head = batch * heads + head
        seed = tl.load(seed_ptr) if DROPOUT else 0
        position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
        start, stop, num_tiles, num_left, num_interior = band_tiles(
            key_start, length, window_right, window_left, BLOCK_N, BLOCK_M
        )
        # p is 0 on rows without a result, but what their q and d_out hold need not be finite
        num_local = count_local(token_kind_ptr + mask_row, start, stop, _KINDS_AT_ONCE)
        if num_local == stop - start:
            dk, dv = _accumulate_dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, stop,
                start, num_tiles - num_interior, num_left, num_interior, lower, upper,
                qk_scale, seed, position_offset, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
            dk, dv = _accumulate_dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
                start + num_left * BLOCK_M, num_interior, 0, 0, lower, upper,
                qk_scale, seed, position_offset, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
        else:
            dk, dv = _accumulate_dkdv_of_band(
                dk, dv, k, v, key_start, q_ptr, d_out_ptr, q_stride_s, d_out_stride_s, lse_ptr, delta_ptr, length,
                start, tl.where(num_local > 0, num_tiles, 0), 0, 0, lower, upper,
                qk_scale, seed, position_offset, batch_head, last_dropped,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, True, DROPOUT, PRECISION, NUM_STAGES,
            )  # fmt: skip
        exists = is_token(padding_before_ptr + mask_row, key, length)[:, None]
        dk = tl.where(exists, dk * (softmax_scale * keep_scale), 0.0)  # selects: rows of padding may hold NaN
        dv = tl.where(exists, dv * keep_scale, 0.0)
    dk_ptr += row_offset(batch, tile_row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr += row_offset(batch, tile_row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    store_tile(dk_ptr, dk_stride_s, dk, key < num_rows, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, dv_stride_s, dv, key < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "queries_per_split"))
def _banded_dkdv_globals_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, partial_dk_ptr, partial_dv_ptr, lse_ptr, delta_ptr,
    seq_start_ptr, seq_len_ptr, global_index_ptr, num_globals_ptr, position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    d_out_stride_b, d_out_stride_s, d_out_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, queries_per_split, softmax_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums dk and dv of a tile of global keys over one split of the local queries: in fp32, without the scales."""
    num_key_tiles = tl.cdiv(max_globals, BLOCK_N)
    split, slot_start = tl.program_id(0) // num_key_tiles, tl.program_id(0) % num_key_tiles * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, _, length, _ = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_globals = tl.load(num_globals_ptr + batch)
    start = split * queries_per_split
    if (start >= length) | (slot_start >= num_globals):
        return
    q_ptr += row_offset(batch, first_row, head, q_stride_b, q_stride_s, q_stride_h)
    d_out_ptr += row_offset(batch, first_row, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    k_ptr += row_offset(batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    lse_row = row_offset(batch, first_row, head, lse_stride_b, 1, lse_stride_h)
    lse_ptr += lse_row
    delta_ptr += lse_row
    slot = slot_start + tl.arange(0, BLOCK_N)
    _, exists, k, v = load_global_keys(
        slot, global_index_ptr + batch * max_globals, num_globals, k_ptr, v_ptr, k_stride_s, v_stride_s,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    qk_scale = softmax_scale * LOG2_E
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    position = slot
    if DROPOUT:
        position = load_global_positions(global_position_ptr + batch * max_globals, slot, num_globals)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    stop = tl.minimum(start + queries_per_split, length)
    for i in tl.range(0, tl.cdiv(stop - start, BLOCK_M), num_stages=NUM_STAGES):
        query_start = start + i * BLOCK_M
        query = query_start + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + query, mask=query < stop, other=float("inf"))
        delta = tl.load(delta_ptr + query, mask=query < stop, other=0.0)
        is_local = lse < float("inf")
        row = query_start.to(tl.int64)
        q = load_tile(q_ptr + row * q_stride_s, q_stride_s, is_local, HEAD_DIM, BLOCK_D, True)
        d_out = load_tile(d_out_ptr + row * d_out_stride_s, d_out_stride_s, is_local, HEAD_DIM, BLOCK_D, True)
        keep = None
        if DROPOUT:
            keep = keep_of_global_keys(
                seed,
                query + position_offset,
                position,
                batch_head,
                BANDED_STREAM,
                last_dropped,
                BLOCK_M,
                BLOCK_N,
            )
            keep = tl.trans(keep)
        p, d_scores = differentiate_tile(
            k, q, v, d_out, lse[None, :] * LOG2_E, delta[None, :], None, keep, 1.0, qk_scale, PRECISION
        )  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)

    # partial_dk, partial_dv: [splits, batch, max_globals, heads, HEAD_DIM]
    partial_row = ((split * tl.num_programs(2) + batch).to(tl.int64) * max_globals + slot) * heads + head
    offsets = partial_row[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
    store_rows(partial_dk_ptr, offsets, dk, exists, HEAD_DIM, BLOCK_D)
    store_rows(partial_dv_ptr, offsets, dv, exists, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "queries_per_split"))
def _sum_splits_kernel(
    partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr, seq_start_ptr, seq_len_ptr, global_index_ptr, num_globals_ptr,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h, mask_stride_b,
    max_globals, queries_per_split, softmax_scale, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up what the splits hold for dk and dv of one global key and head."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if slot >= tl.load(num_globals_ptr + batch):
        return
    first_row, _, length, _ = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_splits = tl.cdiv(length, queries_per_split)
    partial_row = batch.to(tl.int64) * max_globals + slot
    partial_offset = (partial_row * tl.num_programs(1) + head) * HEAD_DIM
    split_stride = tl.num_programs(2).to(tl.int64) * max_globals * tl.num_programs(1)
    dk = sum_splits(
        partial_dk_ptr + partial_offset, split_stride, num_splits, HEAD_DIM, BLOCK_D, BLOCK_SPLITS
    )
    dv = sum_splits(
        partial_dv_ptr + partial_offset, split_stride, num_splits, HEAD_DIM, BLOCK_D, BLOCK_SPLITS
    )
    row = first_row + tl.load(global_index_ptr + batch * max_globals + slot)
    dk_ptr += row_offset(batch, row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr += row_offset(batch, row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    offs_d = tl.arange(0, BLOCK_D)
    store_row(dk_ptr + offs_d, dk * (softmax_scale * keep_scale), HEAD_DIM)
    store_row(dv_ptr + offs_d, dv * keep_scale, HEAD_DIM)


def launch_banded_backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of banded attention -> dq, dk, dv; softmax_scale is above 0."""
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
    arguments |= block_arguments(config, q) | {"BLOCK_G": global_key_block(mask.max_globals)}
    grid = (triton.cdiv(mask.max_seqlen, config.block_m), call.heads, mask.batch)
    launch(_banded_dq_kernel, grid, arguments, config)

    config = configs.choose("banded_dkdv", q.dtype, call.head_dim, call.dropout_p)
    arguments |= block_arguments(config, q)
    grid = (triton.cdiv(mask.max_seqlen, config.block_n), call.heads, mask.batch)
    launch(_banded_dkdv_kernel, grid, arguments, config)
    if mask.max_globals > 0 and q.numel() > 0:
        _launch_dkdv_of_global_keys(arguments, q, mask)
    return dq, dk, dv


def _launch_dkdv_of_global_keys(arguments: dict[str, object], q: Tensor, mask: LongformerMask) -> None:
    """Overwrites the rows of dk and dv at global tokens.

    The splits are so few that their partial results have no more rows than q, unless those of one split have more.
    """
    heads, head_dim = q.shape[-2:]
    config = configs.choose("banded_dkdv_globals", q.dtype, head_dim)
    rows = q.numel() // (heads * head_dim)
    most_splits = max(1, rows // (mask.batch * mask.max_globals))
    num_splits = min(triton.cdiv(mask.max_seqlen, _QUERIES_PER_SPLIT), most_splits)
    shape = (num_splits, mask.batch, mask.max_globals, heads, head_dim)
    block_n = global_key_block(mask.max_globals)
    arguments |= block_arguments(config, q) | {
        "partial_dk_ptr": torch.empty(shape, dtype=torch.float32, device=q.device),
        "partial_dv_ptr": torch.empty(shape, dtype=torch.float32, device=q.device),
        "queries_per_split": triton.cdiv(mask.max_seqlen, num_splits * config.block_m) * config.block_m,
        "BLOCK_N": block_n,
        "BLOCK_SPLITS": _BLOCK_SPLITS,
    }
    grid = (num_splits * triton.cdiv(mask.max_globals, block_n), heads, mask.batch)
    launch(_banded_dkdv_globals_kernel, grid, arguments, config)
    launch(_sum_splits_kernel, (mask.max_globals, heads, mask.batch), arguments)
