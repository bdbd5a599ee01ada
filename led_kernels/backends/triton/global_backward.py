"""Global attention, backward: dq of the few global tokens, dk and dv of every key.

One program per key split, query tile, head and sequence walks over its keys and leaves its share of dq, which a second
kernel sums over the splits. Where all global tokens fit one query tile, as they nearly always do, the same program
writes dk and dv of its keys, so that k and v are read once. Otherwise a third kernel, one program per key tile, walks
over all query tiles for dk and dv. No atomics: every sum has one order.

Bytes moved, over those of k, v, dk and dv once: the shares of dq add ``2 g head_dim 4 bytes`` per split for g global
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
from led_kernels.backends.triton.launch import (
    block_arguments,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    split_keys,
)
from led_kernels.backends.triton.primitives import (
    LOG2_E,
    SIZES,
    count_padding,
    is_token,
    keep_of_block,
    load_rows,
    locate_sequence,
    store_rows,
)
from led_kernels.call import AttentionCall


@triton.jit
def _load_queries(
    slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
    lse_ptr, d_lse_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the backward needs of the global tokens ``slot_start … slot_start + BLOCK_M - 1``.

    Returns:
        q and d_out ``[BLOCK_M, BLOCK_D]``; lse in units of log2, and delta, fp32 ``[BLOCK_M]``. In unused slots 0, 0,
        +inf and 0, so that probabilities and gradients come out as 0.
    """
    rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    slot = slot_start + rows
    exists = slot < num_globals
    first = tl.cast(slot_start, tl.int64)
    q_offsets = rows[:, None] * q_stride_s + offs_d[None, :]
    out_offsets = rows[:, None] * out_stride_s + offs_d[None, :]
    d_out_offsets = rows[:, None] * d_out_stride_s + offs_d[None, :]
    q = load_rows(q_ptr + first * q_stride_s, q_offsets, exists, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr + first * out_stride_s, out_offsets, exists, HEAD_DIM, BLOCK_D, True)
    d_out = load_rows(d_out_ptr + first * d_out_stride_s, d_out_offsets, exists, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(lse_ptr + slot, mask=exists, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + slot, mask=exists, other=0.0)
    return q, d_out, lse * LOG2_E, delta


@triton.jit
def _tile_gradients(
    q, k, v, d_out, lse, delta, slot, num_globals, key_start, key_exists, global_index_ptr,
    qk_scale, keep_scale, seed, batch_head, last_dropped,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities after dropout, not yet scaled, and gradients of the scaled scores: ``[BLOCK_M, BLOCK_N]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.math.exp2(scores * qk_scale - lse[:, None])
    if CHECK_KEYS:
        p = tl.where(key_exists[None, :], p, 0.0)
    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    p_kept = p
    if DROPOUT:
        query = tl.load(global_index_ptr + slot, mask=slot < num_globals, other=0)
        keep = keep_of_block(seed, query, key_start, batch_head, 1, last_dropped, BLOCK_M, BLOCK_N)
        p_kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return p_kept.to(d_out.dtype), ds.to(q.dtype)


@triton.jit
def _attend_keys(
    dq, q, d_out, lse, delta, slot, num_globals, k_ptr, v_ptr, dk_ptr, dv_ptr,
    k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, global_index_ptr, length, num_rows,
    start, num_tiles, softmax_scale, keep_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr, WRITE_DKDV: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """``num_tiles`` tiles of keys from ``start`` on; unless ``CHECK_KEYS``, every key exists and none is padding."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_offsets = offs_n[:, None] * k_stride_s + offs_d[None, :]
    v_offsets = offs_n[:, None] * v_stride_s + offs_d[None, :]
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        key_start = start + i * BLOCK_N
        key = key_start + offs_n  # [BLOCK_N]
        exists = key < length
        if CHECK_KEYS:
            exists = is_token(padding_before_ptr, key, length)
        row = key_start.to(tl.int64)
        k = load_rows(k_ptr + row * k_stride_s, k_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_KEYS)
        v = load_rows(v_ptr + row * v_stride_s, v_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_KEYS)
        p, ds = _tile_gradients(
            q, k, v, d_out, lse, delta, slot, num_globals, key_start, exists, global_index_ptr,
            softmax_scale * LOG2_E, keep_scale, seed, batch_head, last_dropped,
            BLOCK_M, BLOCK_N, CHECK_KEYS, DROPOUT, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if WRITE_DKDV:
            dk_offsets = offs_n[:, None] * dk_stride_s + offs_d[None, :]
            dv_offsets = offs_n[:, None] * dv_stride_s + offs_d[None, :]
            dv = tl.dot(tl.trans(p), d_out, input_precision=PRECISION) * keep_scale
            store_rows(dv_ptr + row * dv_stride_s, dv_offsets, dv, key < num_rows, HEAD_DIM, BLOCK_D)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * softmax_scale
            store_rows(dk_ptr + row * dk_stride_s, dk_offsets, dk, key < num_rows, HEAD_DIM, BLOCK_D)
    return dq


@triton.jit(do_not_specialize=(*SIZES, "keys_per_split"), do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, d_lse_ptr, partial_dq_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, keys_per_split, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WRITE_DKDV: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Shares of dq; with ``WRITE_DKDV`` also dk and dv, from the one query tile that there is."""
    num_query_tiles = tl.cdiv(max_globals, BLOCK_M)
    num_splits = tl.num_programs(0) // num_query_tiles
    split, slot_start = tl.program_id(0) // num_query_tiles, tl.program_id(0) % num_query_tiles * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_globals = tl.load(num_globals_ptr + batch)
    start = split * keys_per_split
    if WRITE_DKDV:
        stop = tl.minimum(start + keys_per_split, num_rows)
        length = tl.where(
            num_globals > 0, length, 0
        )  # dk and dv are written, as zeros, without global tokens too
    else:
        stop = tl.minimum(start + keys_per_split, length)
        stop = tl.where(slot_start < num_globals, stop, 0)
    if start >= stop:
        return
    batch_offset, head_offset = batch.to(tl.int64), head.to(tl.int64)
    q_ptr += batch_offset * q_stride_b + head_offset * q_stride_h
    k_ptr += batch_offset * k_stride_b + head_offset * k_stride_h + first_row * k_stride_s
    v_ptr += batch_offset * v_stride_b + head_offset * v_stride_h + first_row * v_stride_s
    dk_ptr += batch_offset * dk_stride_b + head_offset * dk_stride_h + first_row * dk_stride_s
    dv_ptr += batch_offset * dv_stride_b + head_offset * dv_stride_h + first_row * dv_stride_s
    out_ptr += batch_offset * out_stride_b + head_offset * out_stride_h
    d_out_ptr += batch_offset * d_out_stride_b + head_offset * d_out_stride_h
    lse_ptr += batch_offset * lse_stride_b + head_offset * lse_stride_h
    if d_lse_ptr is not None:
        d_lse_ptr += batch_offset * lse_stride_b + head_offset * lse_stride_h
    global_index_ptr += batch * max_globals
    q, d_out, lse, delta = _load_queries(
        slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
        lse_ptr, d_lse_ptr, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    slot = slot_start + rows
    batch_head = batch * heads + head
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    key_stop = tl.minimum(stop, length)
    counted_stop = tl.maximum(key_stop, start + 1)
    has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, counted_stop) > 0
    num_plain = tl.where(has_padding, 0, tl.maximum(key_stop - start, 0) // BLOCK_N)
    num_checked = tl.cdiv(stop - start, BLOCK_N) - num_plain
    padding_before_ptr += mask_row
    dq = _attend_keys(
        dq, q, d_out, lse, delta, slot, num_globals, k_ptr, v_ptr, dk_ptr, dv_ptr,
        k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, global_index_ptr, length, num_rows,
        start, num_plain, softmax_scale, keep_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, WRITE_DKDV, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    dq = _attend_keys(
        dq, q, d_out, lse, delta, slot, num_globals, k_ptr, v_ptr, dk_ptr, dv_ptr,
        k_stride_s, v_stride_s, dk_stride_s, dv_stride_s, padding_before_ptr, global_index_ptr, length, num_rows,
        start + num_plain * BLOCK_N, num_checked, softmax_scale, keep_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, WRITE_DKDV, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    first = (batch_head.to(tl.int64) * num_splits + split) * max_globals + slot_start
    offsets = rows[:, None] * HEAD_DIM + offs_d[None, :]
    store_rows(partial_dq_ptr + first * HEAD_DIM, offsets, dq, slot < num_globals, HEAD_DIM, BLOCK_D)


@triton.jit
def _attend_queries(
    dk, dv, k, v, key_exists, key_start, num_globals,
    q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr,
    global_index_ptr, softmax_scale, keep_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile from the first ``num_globals`` global tokens."""
    for slot_start in tl.range(0, num_globals, BLOCK_M, num_stages=NUM_STAGES):
        q, d_out, lse, delta = _load_queries(
            slot_start, num_globals, q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s,
            lse_ptr, d_lse_ptr, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        p, ds = _tile_gradients(
            q, k, v, d_out, lse, delta, slot_start + tl.arange(0, BLOCK_M), num_globals,
            key_start, key_exists, global_index_ptr,
            softmax_scale * LOG2_E, keep_scale, seed, batch_head, last_dropped,
            BLOCK_M, BLOCK_N, CHECK_KEYS, DROPOUT, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(p), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, d_lse_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    out_stride_b, out_stride_s, out_stride_h, d_out_stride_b, d_out_stride_s, d_out_stride_h,
    dk_stride_b, dk_stride_s, dk_stride_h, dv_stride_b, dv_stride_s, dv_stride_h,
    lse_stride_b, lse_stride_h, mask_stride_b,
    heads, max_globals, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv from any number of query tiles."""
    key_start = tl.program_id(0) * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, num_rows = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    if key_start >= num_rows:
        return
    num_globals = tl.load(num_globals_ptr + batch)
    batch_offset, head_offset, row = batch.to(tl.int64), head.to(tl.int64), first_row + key_start
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q_ptr += batch_offset * q_stride_b + head_offset * q_stride_h
    k_ptr += batch_offset * k_stride_b + head_offset * k_stride_h + row * k_stride_s
    v_ptr += batch_offset * v_stride_b + head_offset * v_stride_h + row * v_stride_s
    dk_ptr += batch_offset * dk_stride_b + head_offset * dk_stride_h + row * dk_stride_s
    dv_ptr += batch_offset * dv_stride_b + head_offset * dv_stride_h + row * dv_stride_s
    out_ptr += batch_offset * out_stride_b + head_offset * out_stride_h
    d_out_ptr += batch_offset * d_out_stride_b + head_offset * d_out_stride_h
    lse_ptr += batch_offset * lse_stride_b + head_offset * lse_stride_h
    if d_lse_ptr is not None:
        d_lse_ptr += batch_offset * lse_stride_b + head_offset * lse_stride_h
    global_index_ptr += batch * max_globals
    batch_head = batch * heads + head
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    key = key_start + offs_n  # [BLOCK_N]
    stop = tl.minimum(key_start + BLOCK_N, num_rows)
    is_plain = (key_start + BLOCK_N <= length) & (
        count_padding(token_kind_ptr, padding_before_ptr, mask_row, key_start, stop) == 0
    )
    exists = is_token(padding_before_ptr + mask_row, key, length)
    k = load_rows(k_ptr, offs_n[:, None] * k_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n[:, None] * v_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _attend_queries(
        dk, dv, k, v, exists, key_start, tl.where(is_plain, num_globals, 0),
        q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr,
        global_index_ptr, softmax_scale, keep_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    dk, dv = _attend_queries(
        dk, dv, k, v, exists, key_start, tl.where(is_plain | (key_start >= length), 0, num_globals),
        q_ptr, out_ptr, d_out_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_ptr, d_lse_ptr,
        global_index_ptr, softmax_scale, keep_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    dk_offsets = offs_n[:, None] * dk_stride_s + offs_d[None, :]
    dv_offsets = offs_n[:, None] * dv_stride_s + offs_d[None, :]
    store_rows(dk_ptr, dk_offsets, dk * softmax_scale, key < num_rows, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv_offsets, dv * keep_scale, key < num_rows, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "num_splits", "keys_per_split"))
def _sum_splits_kernel(
    partial_dq_ptr, dq_ptr, seq_len_ptr, num_globals_ptr, dq_stride_b, dq_stride_s, dq_stride_h,
    heads, max_globals, num_splits, keys_per_split, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq from its shares, one program per slot, head and sequence."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot_offset, batch_offset, head_offset = slot.to(tl.int64), batch.to(tl.int64), head.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    partial_dq_ptr += ((batch_offset * heads + head) * num_splits * max_globals + slot) * HEAD_DIM
    num_written = tl.cdiv(tl.load(seq_len_ptr + batch), keys_per_split)
    num_written = tl.where(slot < tl.load(num_globals_ptr + batch), num_written, 0)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, num_written, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        offsets = (split.to(tl.int64) * max_globals)[:, None] * HEAD_DIM + offs_d[None, :]
        acc += load_rows(partial_dq_ptr, offsets, split < num_written, HEAD_DIM, BLOCK_D, True)
    dq = tl.sum(acc, 0) * softmax_scale
    dq_ptr += batch_offset * dq_stride_b + slot_offset * dq_stride_s + head_offset * dq_stride_h
    tl.store(dq_ptr + offs_d, dq.to(dq_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def launch_global_backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of global attention -> dq, zeros in unused slots, and dk, dv; softmax_scale is above 0."""
    q, mask = call.q, call.mask
    batch, max_globals, heads, head_dim = q.shape
    dq, dk, dv = new_gradients(call, mask.is_packed)
    if max_globals == 0:
        return dq, dk.zero_(), dv.zero_()
    kernel = "global_dq" if max_globals <= 16 else "global_dq_many"
    config = configs.choose(kernel, q.dtype, head_dim, call.dropout_p)
    blocks = block_arguments(config, q)
    num_query_tiles = triton.cdiv(max_globals, config.block_m)
    num_splits, keys_per_split = split_keys(mask, heads, num_query_tiles, config.block_n)
    partial_dq = torch.empty(
        (batch, heads, num_splits, max_globals, head_dim), dtype=torch.float32, device=q.device
    )
    d_out, lse = d_out.contiguous(), lse.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    shared = {
        **sequence_arguments(mask, q=q, k=call.k, v=call.v, out=out, d_out=d_out, dk=dk, dv=dv),
        **lse_arguments(lse=lse, d_lse=d_lse),
        **softmax_arguments(call),
        "heads": heads,
    }
    _global_dq_kernel[(num_query_tiles * num_splits, heads, batch)](
        **shared,
        partial_dq_ptr=partial_dq,
        keys_per_split=keys_per_split,
        WRITE_DKDV=num_query_tiles == 1,
        **blocks,
    )
    _sum_splits_kernel[(max_globals, heads, batch)](
        partial_dq_ptr=partial_dq,
        dq_ptr=dq,
        dq_stride_b=dq.stride(0),
        dq_stride_s=dq.stride(1),
        dq_stride_h=dq.stride(2),
        seq_len_ptr=mask.seq_len,
        num_globals_ptr=mask.num_globals,
        heads=heads,
        max_globals=max_globals,
        num_splits=num_splits,
        keys_per_split=keys_per_split,
        softmax_scale=call.softmax_scale,
        HEAD_DIM=head_dim,
        BLOCK_D=blocks["BLOCK_D"],
        BLOCK_S=16,
    )
    if num_query_tiles > 1:
        config = configs.choose("global_dkdv_many", q.dtype, head_dim, call.dropout_p)
        num_key_tiles = triton.cdiv(mask.max_seqlen, config.block_n)
        _global_dkdv_kernel[(num_key_tiles, heads, batch)](**shared, **block_arguments(config, q))
    return dq, dk, dv
