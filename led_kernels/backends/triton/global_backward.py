"""The backward of global attention computes dq of the few global tokens, and dk and dv of every key.

One program per split of the keys, query tile, head and sequence walks over its keys and leaves its partial dq, which a
second kernel sums over the splits. Where all global tokens fit one query tile, as they nearly always do, the same
program writes dk and dv of its keys, so that k and v are read once. Otherwise a third kernel, one program per key tile,
walks over all query tiles for dk and dv. There are no atomics: every sum has one order.

Bytes moved, over those of k, v, dk and dv once: the partial dq add ``2 g head_dim 4 bytes`` per split for g global
tokens, that is ``g / s`` in a 2-byte dtype with splits of s keys: 0.3% for one token and the 384 keys of a split at
16,384 tokens and 12 heads. delta is computed anew from out and d_out wherever it is needed, because their rows are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from led_kernels.backends._results import new_gradients
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.dropout import GLOBAL_STREAM, keep_of_tile
from led_kernels.backends.triton.launch import (
    SIZES,
    block_arguments,
    launch,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    split_keys,
)
from led_kernels.backends.triton.mask import (
    count_padding,
    is_token,
    key_exists,
    load_global_positions,
    locate_sequence,
)
from led_kernels.backends.triton.softmax import LOG2_E, differentiate_tile
from led_kernels.backends.triton.splits import sum_splits
from led_kernels.backends.triton.tiles import load_queries, load_tile, row_offset, store_row, store_tile
from led_kernels.call import AttentionCall

_BLOCK_SPLITS = 16  # that are summed at a time


@triton.jit
def _load_global_queries(
    slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
    lse_ptr, d_lse_ptr, lse_row, global_position_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Loads what the backward needs of the global tokens in slots ``slot_start … slot_start + BLOCK_M - 1``.

    Returns:
        q, d_out: ``[BLOCK_M, BLOCK_D]``.
        lse, delta: fp32 ``[BLOCK_M]``; lse in units of log2.
        query: the tokens' positions, which only dropout needs; without it the slots.

        A slot that holds no global token has an lse of +inf and zeros otherwise, so that its gradients are 0.
    """
    slot = slot_start + tl.arange(0, BLOCK_M)
    exists = slot < num_globals
    first = tl.cast(slot_start, tl.int64)
    q, d_out, delta = load_queries(
        q_ptr + first * q_stride_s, out_ptr + first * out_stride_s, d_out_ptr + first * d_out_stride_s, d_lse_ptr,
        q_stride_s, out_stride_s, d_out_stride_s, lse_row + slot, exists, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + lse_row + slot, mask=exists, other=float("inf"))
    query = slot
    if DROPOUT:
        query = load_global_positions(global_position_ptr, slot, num_globals)
    return q, d_out, lse * LOG2_E, delta, query


@triton.jit
def _differentiate_global_tile(
    q, k, v, d_out, lse, delta, query, key_start, exists,
    softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Runs :func:`differentiate_tile` on global queries and neighboring keys, in the dtypes of the next products."""
    visible = None
    if IS_MASKED:
        visible = exists[None, :]
    keep = None
    if DROPOUT:
        keep = keep_of_tile(
            seed,
            query,
            key_start + position_offset,
            batch_head,
            GLOBAL_STREAM,
            last_dropped,
            BLOCK_M,
            BLOCK_N,
        )
    p, d_scores = differentiate_tile(
        q, k, d_out, v, lse[:, None], delta[:, None], visible, keep, keep_scale, softmax_scale * LOG2_E, PRECISION
    )  # fmt: skip
    return p.to(d_out.dtype), d_scores.to(q.dtype)


@triton.jit
def _accumulate_dq(
    dq, q, d_out, lse, delta, query, k_ptr, v_ptr, dk_ptr, dv_ptr,
    k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, length, num_rows,
    start, num_tiles, softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, WRITE_DKDV: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dq what ``num_tiles`` tiles of keys from ``start`` on contribute; with ``WRITE_DKDV`` writes dk and dv.

    They are interior tiles unless ``IS_MASKED``; the keys of masked tiles may be padding or lie behind the sequence.
    """
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        key_start = start + i * BLOCK_N
        key = key_start + tl.arange(0, BLOCK_N)
        exists = key_exists(padding_before_ptr, key, length, IS_MASKED)
        row = key_start.to(tl.int64)
        k = load_tile(k_ptr + row * k_stride_s, k_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        v = load_tile(v_ptr + row * v_stride_s, v_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        p, d_scores = _differentiate_global_tile(
            q, k, v, d_out, lse, delta, query, key_start, exists,
            softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
            BLOCK_M, BLOCK_N, IS_MASKED, DROPOUT, PRECISION,
        )  # fmt: skip
        dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
        if WRITE_DKDV:
            dv = tl.dot(tl.trans(p), d_out, input_precision=PRECISION) * keep_scale
            store_tile(dv_ptr + row * dv_stride_s, dv_stride_s, dv, key < num_rows, HEAD_DIM, BLOCK_D)
            dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION) * softmax_scale
            store_tile(dk_ptr + row * dk_stride_s, dk_stride_s, dk, key < num_rows, HEAD_DIM, BLOCK_D)
    return dq


@triton.jit(do_not_specialize=(*SIZES, "keys_per_split"), do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, d_lse_ptr, partial_dq_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, num_globals_ptr,
    position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, keys_per_split, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WRITE_DKDV: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums dq over one split of the keys; with ``WRITE_DKDV`` also writes dk and dv, from the only query tile."""
    num_query_tiles = tl.cdiv(max_globals, BLOCK_M)
    num_splits = tl.num_programs(0) // num_query_tiles
    split, slot_start = tl.program_id(0) // num_query_tiles, tl.program_id(0) % num_query_tiles * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_globals = tl.load(num_globals_ptr + batch)
    start = split * keys_per_split
    if WRITE_DKDV:
        stop = tl.minimum(start + keys_per_split, num_rows)
        length = tl.where(num_globals > 0, length, 0)  # without global tokens dk and dv are written as zeros
    else:
        stop = tl.minimum(start + keys_per_split, length)
        stop = tl.where(slot_start < num_globals, stop, 0)
    if start >= stop:
        return
    q_ptr += row_offset(batch, 0, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr += row_offset(batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    dk_ptr += row_offset(batch, first_row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr += row_offset(batch, first_row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    out_ptr += row_offset(batch, 0, head, out_stride_b, out_stride_s, out_stride_h)
    d_out_ptr += row_offset(batch, 0, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    lse_row = row_offset(batch, 0, head, lse_stride_b, 1, lse_stride_h)
    q, d_out, lse, delta, query = _load_global_queries(
        slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
        lse_ptr, d_lse_ptr, lse_row, global_position_ptr + batch * max_globals, HEAD_DIM, BLOCK_D, BLOCK_M, DROPOUT,
    )  # fmt: skip
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    key_stop = tl.minimum(stop, length)
    counted_stop = tl.maximum(key_stop, start + 1)
    has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, counted_stop) > 0
    num_interior = tl.where(has_padding, 0, tl.maximum(key_stop - start, 0) // BLOCK_N)
    num_masked = tl.cdiv(stop - start, BLOCK_N) - num_interior
    padding_before_ptr += mask_row
    dq = _accumulate_dq(
        dq, q, d_out, lse, delta, query, k_ptr, v_ptr, dk_ptr, dv_ptr,
        k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, length, num_rows,
        start, num_interior, softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, WRITE_DKDV, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, d_out, lse, delta, query, k_ptr, v_ptr, dk_ptr, dv_ptr,
        k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, length, num_rows,
        start + num_interior * BLOCK_N, num_masked, softmax_scale, keep_scale,
        seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, WRITE_DKDV, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    # partial_dq: [batch, heads, splits, max_globals, HEAD_DIM]
    partial_row = (batch_head.to(tl.int64) * num_splits + split) * max_globals + slot_start
    exists = slot_start + tl.arange(0, BLOCK_M) < num_globals
    store_tile(partial_dq_ptr + partial_row * HEAD_DIM, HEAD_DIM, dq, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, exists, key_start, num_globals,
    q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr, lse_row,
    global_position_ptr, softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv of a tile of keys what the first ``num_globals`` global tokens contribute."""
    for slot_start in tl.range(0, num_globals, BLOCK_M, num_stages=NUM_STAGES):
        q, d_out, lse, delta, query = _load_global_queries(
            slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
            lse_ptr, d_lse_ptr, lse_row, global_position_ptr, HEAD_DIM, BLOCK_D, BLOCK_M, DROPOUT,
        )  # fmt: skip
        p, d_scores = _differentiate_global_tile(
            q, k, v, d_out, lse, delta, query, key_start, exists,
            softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
            BLOCK_M, BLOCK_N, IS_MASKED, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(p), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(d_scores), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, d_lse_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, num_globals_ptr,
    position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of a tile of keys, from any number of query tiles."""
    key_start = tl.program_id(0) * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if key_start >= num_rows:
        return
    num_globals = tl.load(num_globals_ptr + batch)
    row = first_row + key_start
    q_ptr += row_offset(batch, 0, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr += row_offset(batch, row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, row, head, v_stride_b, v_stride_s, v_stride_h)
    dk_ptr += row_offset(batch, row, head, dk_stride_b, dk_stride_s, dk_stride_h)
    dv_ptr += row_offset(batch, row, head, dv_stride_b, dv_stride_s, dv_stride_h)
    out_ptr += row_offset(batch, 0, head, out_stride_b, out_stride_s, out_stride_h)
    d_out_ptr += row_offset(batch, 0, head, d_out_stride_b, d_out_stride_s, d_out_stride_h)
    lse_row = row_offset(batch, 0, head, lse_stride_b, 1, lse_stride_h)
    global_position_ptr += batch * max_globals
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    key = key_start + tl.arange(0, BLOCK_N)
    stop = tl.minimum(key_start + BLOCK_N, num_rows)
    is_interior = (key_start + BLOCK_N <= length) & (
        count_padding(token_kind_ptr, padding_before_ptr, mask_row, key_start, stop) == 0
    )
    exists = is_token(padding_before_ptr + mask_row, key, length)
    k = load_tile(k_ptr, k_stride_s, exists, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, v_stride_s, exists, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, exists, key_start, tl.where(is_interior, num_globals, 0),
        q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr, lse_row,
        global_position_ptr, softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, exists, key_start, tl.where(is_interior | (key_start >= length), 0, num_globals),
        q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr, lse_row,
        global_position_ptr, softmax_scale, keep_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    store_tile(dk_ptr, dk_stride_s, dk * softmax_scale, key < num_rows, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, dv_stride_s, dv * keep_scale, key < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "num_splits", "keys_per_split"))
def _sum_splits_kernel(
    partial_dq_ptr, dq_ptr, seq_len_ptr, num_globals_ptr, dq_stride_b, dq_stride_s, dq_stride_h,
    heads, max_globals, num_splits, keys_per_split, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up what the splits hold for dq of one slot and head; dq of a slot that holds no global token is 0."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    partial_dq_ptr += ((batch.to(tl.int64) * heads + head) * num_splits * max_globals + slot) * HEAD_DIM
    num_written = tl.cdiv(tl.load(seq_len_ptr + batch), keys_per_split)
    num_written = tl.where(slot < tl.load(num_globals_ptr + batch), num_written, 0)
    dq = sum_splits(partial_dq_ptr, max_globals, num_written, HEAD_DIM, BLOCK_D, BLOCK_SPLITS)
    dq_ptr += row_offset(batch, slot, head, dq_stride_b, dq_stride_s, dq_stride_h)
    store_row(dq_ptr + tl.arange(0, BLOCK_D), dq * softmax_scale, HEAD_DIM)


def launch_global_backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of global attention -> dq, zeros in unused slots, and dk, dv; softmax_scale is above 0."""
    q, mask = call.q, call.mask
    batch, max_globals, heads, head_dim = q.shape
    dq, dk, dv = new_gradients(call, mask.is_packed)
    if max_globals == 0:
        return dq, dk.zero_(), dv.zero_()
    kernel = "global_dq" if max_globals <= 16 else "global_dq_many"
    config = configs.choose(kernel, q.dtype, head_dim, call.dropout_p)
    num_query_tiles = triton.cdiv(max_globals, config.block_m)
    num_splits, keys_per_split = split_keys(mask, heads, num_query_tiles, config.block_n)
    d_out, lse = d_out.contiguous(), lse.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    partial_shape = (batch, heads, num_splits, max_globals, head_dim)
    arguments = {
        **sequence_arguments(mask, q=q, k=call.k, v=call.v, out=out, d_out=d_out, dq=dq, dk=dk, dv=dv),
        **lse_arguments(lse=lse, d_lse=d_lse),
        **softmax_arguments(call),
        **block_arguments(config, q),
        "partial_dq_ptr": torch.empty(partial_shape, dtype=torch.float32, device=q.device),
        "heads": heads,
        "num_splits": num_splits,
        "keys_per_split": keys_per_split,
        "BLOCK_SPLITS": _BLOCK_SPLITS,
        "WRITE_DKDV": num_query_tiles == 1,
    }
    launch(_global_dq_kernel, (num_query_tiles * num_splits, heads, batch), arguments, config)
    launch(_sum_splits_kernel, (max_globals, heads, batch), arguments)
    if num_query_tiles > 1:
        config = configs.choose("global_dkdv_many", q.dtype, head_dim, call.dropout_p)
        num_key_tiles = triton.cdiv(mask.max_seqlen, config.block_n)
        arguments |= block_arguments(config, q)
        launch(_global_dkdv_kernel, (num_key_tiles, heads, batch), arguments, config)
    return dq, dk, dv
