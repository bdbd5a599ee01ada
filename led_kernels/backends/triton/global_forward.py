"""Global attention, forward: few queries, the global tokens, against every key of their sequence.

The keys are split, so that one global token fills a GPU: one program per key split, query tile, head and sequence
leaves its normalised partial out and its partial lse, which a second kernel merges. Both are fp32, and only slots that
hold a global token are written and read.

Bytes moved, over those of reading k and v once: the partials of g global tokens add ``2 g (head_dim + 1) 4 bytes`` per
split, that is ``2 g / s`` of k and v in a 2-byte dtype with splits of s keys: 0.5% for one token and the 384 keys of a
split at 16,384 tokens and 12 heads. More than 64 global tokens read k and v once per tile of 64; the programs of one
split run side by side, so that all but the first find them in L2.

Source of the algorithm: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from led_kernels.backends._results import new_results
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.launch import (
    MAX_SPLITS,
    block_arguments,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    split_keys,
)
from led_kernels.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    NO_KEY,
    SIZES,
    count_padding,
    is_token,
    keep_of_block,
    load_rows,
    locate_sequence,
    online_softmax_update,
    store_rows,
)
from led_kernels.call import AttentionCall


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
    start, num_tiles, qk_scale, seed, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """``num_tiles`` tiles of keys from ``start`` on; unless ``CHECK_KEYS``, every key exists and none is padding."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
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
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if CHECK_KEYS:
            scores = tl.where(exists[None, :], scores, float("-inf"))
        p, acc, row_sum, row_max = online_softmax_update(scores, acc, row_sum, row_max, qk_scale)
        if DROPOUT:
            keep = keep_of_block(seed, query, key_start, batch_head, 1, last_dropped, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_rows(v_ptr + row * v_stride_s, v_offsets, exists, HEAD_DIM, BLOCK_D, CHECK_KEYS)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=(*SIZES, "keys_per_split"), do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_forward_kernel(
    q_ptr, k_ptr, v_ptr, partial_out_ptr, partial_lse_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, global_index_ptr, num_globals_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    mask_stride_b, heads, max_globals, keys_per_split, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(max_globals, BLOCK_M)
    num_splits = tl.num_programs(0) // num_tiles
    split, slot_start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BLOCK_M
    head, batch = tl.program_id(1), tl.program_id(2)
    first_row, mask_row, length, _ = locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b)
    num_globals = tl.load(num_globals_ptr + batch)
    start = split * keys_per_split
    if (start >= length) | (slot_start >= num_globals):
        return
    stop = tl.minimum(start + keys_per_split, length)
    batch_offset, head_offset = batch.to(tl.int64), head.to(tl.int64)
    rows, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    slot = slot_start + rows
    exists = slot < num_globals
    q_ptr += batch_offset * q_stride_b + head_offset * q_stride_h + slot_start.to(tl.int64) * q_stride_s
    k_ptr += batch_offset * k_stride_b + head_offset * k_stride_h + first_row * k_stride_s
    v_ptr += batch_offset * v_stride_b + head_offset * v_stride_h + first_row * v_stride_s
    q = load_rows(q_ptr, rows[:, None] * q_stride_s + offs_d[None, :], exists, HEAD_DIM, BLOCK_D, True)
    qk_scale = softmax_scale * LOG2_E
    batch_head = batch * heads + head
    seed = 0
    query = slot
    if DROPOUT:
        seed = tl.load(seed_ptr)
        query = tl.load(global_index_ptr + batch * max_globals + slot, mask=exists, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], NO_KEY, tl.float32)

    has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) > 0
    num_plain = tl.where(has_padding, 0, (stop - start) // BLOCK_N)
    num_checked = tl.cdiv(stop - start, BLOCK_N) - num_plain
    padding_before_ptr += mask_row
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
        start, num_plain, qk_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
        start + num_plain * BLOCK_N, num_checked, qk_scale, seed, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip

    # a split of only padding: lse -inf, out 0
    acc *= tl.where(row_sum > 0, keep_scale / row_sum, 0.0)[:, None]
    first = (batch_head.to(tl.int64) * num_splits + split) * max_globals + slot_start
    partial_offsets = rows[:, None] * HEAD_DIM + offs_d[None, :]
    store_rows(partial_out_ptr + first * HEAD_DIM, partial_offsets, acc, exists, HEAD_DIM, BLOCK_D)
    tl.store(partial_lse_ptr + first + rows, (row_max + tl.math.log2(row_sum)) * LN_2, mask=exists)


@triton.jit(do_not_specialize=(*SIZES, "num_splits", "keys_per_split"))
def _merge_splits_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, seq_len_ptr, num_globals_ptr,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_h,
    heads, max_globals, num_splits, keys_per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per slot, head and sequence."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot_offset, batch_offset, head_offset = slot.to(tl.int64), batch.to(tl.int64), head.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    out_ptr += batch_offset * out_stride_b + slot_offset * out_stride_s + head_offset * out_stride_h
    lse_ptr += batch_offset * lse_stride_b + head_offset * lse_stride_h + slot
    if slot >= tl.load(num_globals_ptr + batch):
        tl.store(out_ptr + offs_d, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=in_head)
        tl.store(lse_ptr, float("inf"))
        return

    first = (batch_offset * heads + head) * num_splits * max_globals + slot
    partial_out_ptr += first * HEAD_DIM
    partial_lse_ptr += first
    num_written = tl.cdiv(tl.load(seq_len_ptr + batch), keys_per_split)
    all_splits = tl.arange(0, MAX_SPLITS)
    lse_of_splits = tl.load(
        partial_lse_ptr + all_splits * max_globals, mask=all_splits < num_written, other=float("-inf")
    )
    largest = tl.max(lse_of_splits, 0)
    lse = largest + tl.log(tl.sum(tl.exp(lse_of_splits - largest), 0))
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, num_written, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        exists = split < num_written
        row = split.to(tl.int64) * max_globals
        partial_lse = tl.load(partial_lse_ptr + row, mask=exists, other=float("-inf"))
        offsets = row[:, None] * HEAD_DIM + offs_d[None, :]
        partial_out = load_rows(partial_out_ptr, offsets, exists, HEAD_DIM, BLOCK_D, True)
        acc += tl.exp(partial_lse - lse)[:, None] * partial_out
    tl.store(out_ptr + offs_d, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr, lse)


def launch_global_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Global attention -> out, lse; softmax_scale is above 0."""
    q, mask = call.q, call.mask
    batch, max_globals, heads, head_dim = q.shape
    kernel = "global_forward" if max_globals <= 16 else "global_forward_many"
    config = configs.choose(kernel, q.dtype, head_dim, call.dropout_p)
    blocks = block_arguments(config, q)
    num_tiles = triton.cdiv(max_globals, config.block_m)
    num_splits, keys_per_split = split_keys(mask, heads, num_tiles, config.block_n)
    new = {"dtype": torch.float32, "device": q.device}
    partials = {
        "partial_out_ptr": torch.empty((batch, heads, num_splits, max_globals, head_dim), **new),
        "partial_lse_ptr": torch.empty((batch, heads, num_splits, max_globals), **new),
    }
    out, lse = new_results(call, mask.is_packed)
    _global_forward_kernel[(num_tiles * num_splits, heads, batch)](
        **sequence_arguments(mask, q=q, k=call.k, v=call.v),
        **partials,
        **softmax_arguments(call),
        heads=heads,
        keys_per_split=keys_per_split,
        **blocks,
    )
    _merge_splits_kernel[(max_globals, heads, batch)](
        **partials,
        **lse_arguments(lse=lse),
        out_ptr=out,
        out_stride_b=out.stride(0),
        out_stride_s=out.stride(1),
        out_stride_h=out.stride(2),
        seq_len_ptr=mask.seq_len,
        num_globals_ptr=mask.num_globals,
        heads=heads,
        max_globals=max_globals,
        num_splits=num_splits,
        keys_per_split=keys_per_split,
        HEAD_DIM=head_dim,
        BLOCK_D=blocks["BLOCK_D"],
        BLOCK_S=16,
        MAX_SPLITS=MAX_SPLITS,
    )
    return out, lse
