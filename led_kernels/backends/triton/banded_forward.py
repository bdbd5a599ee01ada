"""The forward of banded attention runs one program per query tile, head and sequence.

A program attends first to the global keys, gathered through ``global_index``; it skips those inside a query's band,
because the band's tiles hold them. Of these only the tiles that a band edge or the sequence's end crosses are masked
tiles, the others are interior ones. Where a program's keys hold padding, all its tiles are masked.

Floors at 16,384 tokens, window 512, head_dim 64 on sm_80: a warp's products with 128 keys keep a tensor core busy for
1,024 cycles; its interior tile issues 610 instructions, 66 of them exponentials of 8 cycles; q, k, v and out cross
memory about once where a head's k and v fit into half of the L2. So the products are the floor; what is above it are
the masked tiles, which the band needs half of, latencies and barriers.

Row sums stay in fp32: a product with ones would save a tenth of the instructions, but sums rounded probabilities, and
lse then misses the error bound where they are nearly equal (1.0e-3 instead of 1.9e-4 in bf16).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from led_kernels.backends._results import new_results
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.dropout import BANDED_STREAM, keep_of_global_keys, keep_of_tile
from led_kernels.backends.triton.launch import (
    SIZES,
    block_arguments,
    descriptor,
    global_key_block,
    launch,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    window_arguments,
)
from led_kernels.backends.triton.mask import (
    LOCAL,
    PADDING,
    band_mask,
    band_tiles,
    count_padding,
    is_between,
    key_exists,
    load_global_positions,
    locate_sequence,
)
from led_kernels.backends.triton.softmax import LOG2_E, attend_tile, empty_softmax, log_sum_exp
from led_kernels.backends.triton.tiles import (
    load_global_keys,
    load_tile,
    row_offset,
    store_rows,
    tile_offsets,
)
from led_kernels.call import AttentionCall


@triton.jit
def _attend_global_keys(
    acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
    global_index_ptr, global_position_ptr, num_globals, lower, upper,
    qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to the global keys that lie outside each query's band, ``lower … upper``."""
    for start in tl.range(0, num_globals, BLOCK_G, num_stages=1):
        slot = start + tl.arange(0, BLOCK_G)
        key, exists, k, v = load_global_keys(
            slot, global_index_ptr, num_globals, k_ptr, v_ptr, k_stride_s, v_stride_s, HEAD_DIM, BLOCK_D
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_G]
        scores = tl.where(exists[None, :] & ~is_between(key, lower, upper), scores, float("-inf"))
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
        acc, row_sum, row_max = attend_tile(acc, row_sum, row_max, scores, v, keep, qk_scale, PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _attend_band(
    acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, k_desc, v_desc, desc_batch, desc_row,
    desc_head, padding_before_ptr, length, start, num_tiles, gap_at, gap, lower, upper,
    qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_PADDING: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attends to ``num_tiles`` tiles of neighboring keys from ``start`` on.

    Before tile ``gap_at`` of them ``gap`` tiles are passed over.

    Args:
        k_desc, v_desc: tensor descriptors to load by, at ``desc_batch``, row ``desc_row`` + key and ``desc_head``; None
            to load by pointers, which can leave out rows.
        length: the keys from this one on are not loaded. Without ``HAS_PADDING`` it is the end of the keys among which
            the program has found no padding: a tile may reach further, over rows that hold NaN.
        lower, upper: the band of each query.
        IS_MASKED: whether the tiles are masked tiles; else they are interior ones.
        HAS_PADDING: whether the keys of masked tiles may be padding.
    """
    key_start = start
    if IS_MASKED:
        key_start += tl.where(gap_at == 0, gap * BLOCK_N, 0)
    k_ptr += key_start.to(tl.int64) * k_stride_s
    v_ptr += key_start.to(tl.int64) * v_stride_s
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        key = key_start + tl.arange(0, BLOCK_N)
        exists = key_exists(padding_before_ptr, key, length, HAS_PADDING)
        if k_desc is None:
            k = load_tile(k_ptr, k_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        else:
            k = k_desc.load([desc_batch, desc_row + key_start, desc_head, 0]).reshape(BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if IS_MASKED:
            visible = band_mask(key, exists, lower, upper, HAS_PADDING)
            scores = tl.where(visible, scores, float("-inf"))
        keep = None
        if DROPOUT:
            keep = keep_of_tile(
                seed, query + position_offset, key_start + position_offset, batch_head, BANDED_STREAM, last_dropped,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if v_desc is None:
            v = load_tile(v_ptr, v_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        else:
            v = v_desc.load([desc_batch, desc_row + key_start, desc_head, 0]).reshape(BLOCK_N, BLOCK_D)
        acc, row_sum, row_max = attend_tile(acc, row_sum, row_max, scores, v, keep, qk_scale, PRECISION)
        key_start += BLOCK_N
        k_ptr += BLOCK_N * k_stride_s
        v_ptr += BLOCK_N * v_stride_s
        if IS_MASKED:
            skipped = tl.where(i + 1 == gap_at, gap * BLOCK_N, 0)
            key_start += skipped
            k_ptr += skipped.to(tl.int64) * k_stride_s
            v_ptr += skipped.to(tl.int64) * v_stride_s
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _banded_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr,
    position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, window_left, window_right, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, PADDED_BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of a tile of queries.

    Tiles have ``BLOCK_N`` keys of the band, ``PADDED_BLOCK_N`` where it holds padding, or ``BLOCK_G`` global keys.
    """
    query_start = tl.program_id(0) * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if query_start >= num_rows:
        return
    tile_row = first_row + query_start
    query = query_start + tl.arange(0, BLOCK_M)
    out_ptr += row_offset(batch, tile_row, head, out_stride_b, out_stride_s, out_stride_h)
    lse_ptr += row_offset(batch, first_row, head, lse_stride_b, 1, lse_stride_h)
    out_offsets = tile_offsets(out_stride_s, BLOCK_M, BLOCK_D)  # of both stores, which saves registers
    is_written = query < num_rows
    acc, row_sum, row_max = empty_softmax(BLOCK_M, BLOCK_D)
    # q is loaded without regard to it: a load of one byte must not decide about an operand (see is_token)
    is_local = tl.load(token_kind_ptr + mask_row + query, mask=query < length, other=PADDING) == LOCAL
    if tl.max(is_local.to(tl.int32), 0) == 0:  # no row has a result
        store_rows(out_ptr, out_offsets, acc, is_written, HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + query, float("inf"), mask=is_written)
        return

    q_ptr += row_offset(batch, tile_row, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr += row_offset(batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    start, stop, num_tiles, num_left, num_interior = band_tiles(
        query_start, length, window_left, window_right, BLOCK_M, BLOCK_N
    )
    has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) > 0
    q = load_tile(q_ptr, q_stride_s, query < length, HEAD_DIM, BLOCK_D, True)
    qk_scale = softmax_scale * LOG2_E
    lower, upper = query - window_left, tl.minimum(query + window_right, length - 1)  # the band of each query
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    acc, row_sum, row_max = _attend_global_keys(
        acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s,
        global_index_ptr + batch * max_globals, global_position_ptr + batch * max_globals,
        tl.load(num_globals_ptr + batch), lower, query + window_right,
        qk_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, DROPOUT, PRECISION,
    )  # fmt: skip
    if not has_padding:
        acc, row_sum, row_max = _attend_band(
            acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, None, None, batch,
            first_row.to(tl.int32), head, padding_before_ptr + mask_row, stop,
            start, num_tiles - num_interior, num_left, num_interior, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
        acc, row_sum, row_max = _attend_band(
            acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, k_desc, v_desc,
            tl.where(mask_stride_b == 0, 0, batch),  # packed sequences are one batch entry
            first_row.to(tl.int32), head, padding_before_ptr + mask_row, length,
            start + num_left * BLOCK_N, num_interior, 0, 0, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, DROPOUT, PRECISION, NUM_STAGES,
        )  # fmt: skip
    else:
        acc, row_sum, row_max = _attend_band(
            acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, None, None, batch,
            first_row.to(tl.int32), head, padding_before_ptr + mask_row, length,
            start, tl.cdiv(stop - start, PADDED_BLOCK_N), 0, 0, lower, upper,
            qk_scale, seed, position_offset, batch_head, last_dropped,
            HEAD_DIM, BLOCK_D, BLOCK_M, PADDED_BLOCK_N, True, True, DROPOUT, PRECISION, 1,
        )  # fmt: skip

    acc *= (keep_scale / row_sum)[:, None]
    acc = tl.where(is_local[:, None], acc, 0.0)  # selects: other rows may hold NaN
    store_rows(out_ptr, out_offsets, acc, is_written, HEAD_DIM, BLOCK_D)
    lse = tl.where(is_local, log_sum_exp(row_sum, row_max), float("inf"))
    tl.store(lse_ptr + query, lse, mask=is_written)


def launch_banded_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes banded attention -> out, lse; softmax_scale is above 0."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    out, lse = new_results(call, mask.is_packed)
    config = configs.choose("banded_forward", q.dtype, call.head_dim, call.dropout_p)
    k_desc, v_desc = (
        descriptor(x, config.block_n) if configs.loads_by_descriptor() else None for x in (k, v)
    )
    grid = (triton.cdiv(mask.max_seqlen, config.block_m), call.heads, mask.batch)
    arguments = {
        **sequence_arguments(mask, q=q, k=k, v=v, out=out),
        **lse_arguments(lse=lse),
        **softmax_arguments(call),
        **block_arguments(config, q),
        "k_desc": k_desc,
        "v_desc": v_desc,
        **window_arguments(call),
        "heads": call.heads,
        "BLOCK_G": global_key_block(mask.max_globals),
        "PADDED_BLOCK_N": max(16, config.block_n // 4),
    }
    launch(_banded_forward_kernel, grid, arguments, config)
    return out, lse
