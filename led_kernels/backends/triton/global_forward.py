"""The forward of global attention takes few queries, the global tokens, with every key of their sequence.

The keys are split, so that one global token fills a GPU: one program per split, query tile, head and sequence leaves
its normalized partial out and its partial lse, which a second kernel merges. Both are fp32, and only slots that hold a
global token are written and read.

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
from led_kernels.backends.triton.dropout import GLOBAL_STREAM, keep_of_tile
from led_kernels.backends.triton.launch import (
    MAX_SPLITS,
    SIZES,
    block_arguments,
    launch,
    lse_arguments,
    sequence_arguments,
    softmax_arguments,
    split_keys,
)
from led_kernels.backends.triton.mask import count_padding, key_exists, load_global_positions, locate_sequence
from led_kernels.backends.triton.softmax import LOG2_E, attend_tile, empty_softmax, log_sum_exp
from led_kernels.backends.triton.splits import load_splits
from led_kernels.backends.triton.tiles import load_tile, row_offset, store_row, store_tile
from led_kernels.call import AttentionCall

_BLOCK_SPLITS = 16  # that are merged at a time


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
    start, num_tiles, qk_scale, seed, position_offset, batch_head, last_dropped,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attends to ``num_tiles`` tiles of keys from ``start`` on.

    They are interior tiles unless ``IS_MASKED``; the keys of masked tiles may be padding or lie behind the sequence.
    """
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        key_start = start + i * BLOCK_N
        key = key_start + tl.arange(0, BLOCK_N)
        exists = key_exists(padding_before_ptr, key, length, IS_MASKED)
        row = key_start.to(tl.int64)
        k = load_tile(k_ptr + row * k_stride_s, k_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if IS_MASKED:
            scores = tl.where(exists[None, :], scores, float("-inf"))
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
        v = load_tile(v_ptr + row * v_stride_s, v_stride_s, exists, HEAD_DIM, BLOCK_D, IS_MASKED)
        acc, row_sum, row_max = attend_tile(acc, row_sum, row_max, scores, v, keep, qk_scale, PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=(*SIZES, "keys_per_split"), do_not_specialize_on_alignment=("token_kind_ptr",))
def _global_forward_kernel(
    q_ptr, k_ptr, v_ptr, partial_out_ptr, partial_lse_ptr,
    seq_start_ptr, seq_len_ptr, token_kind_ptr, padding_before_ptr, num_globals_ptr,
    position_offset_ptr, global_position_ptr, seed_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    mask_stride_b, heads, max_globals, keys_per_split, softmax_scale, keep_scale, last_dropped: tl.uint32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the partial out and lse of a tile of global tokens over one split of the keys."""
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
    slot = slot_start + tl.arange(0, BLOCK_M)
    exists = slot < num_globals
    q_ptr += row_offset(batch, slot_start, head, q_stride_b, q_stride_s, q_stride_h)
    k_ptr += row_offset(batch, first_row, head, k_stride_b, k_stride_s, k_stride_h)
    v_ptr += row_offset(batch, first_row, head, v_stride_b, v_stride_s, v_stride_h)
    q = load_tile(q_ptr, q_stride_s, exists, HEAD_DIM, BLOCK_D, True)
    qk_scale = softmax_scale * LOG2_E
    batch_head = batch * heads + head
    seed = tl.load(seed_ptr) if DROPOUT else 0
    position_offset = tl.load(position_offset_ptr + batch) if DROPOUT else 0
    query = slot
    if DROPOUT:
        query = load_global_positions(global_position_ptr + batch * max_globals, slot, num_globals)
    acc, row_sum, row_max = empty_softmax(BLOCK_M, BLOCK_D)

    has_padding = count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop) > 0
    num_interior = tl.where(has_padding, 0, (stop - start) // BLOCK_N)
    num_masked = tl.cdiv(stop - start, BLOCK_N) - num_interior
    padding_before_ptr += mask_row
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
        start, num_interior, qk_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip
    acc, row_sum, row_max = _attend_keys(
        acc, row_sum, row_max, q, query, k_ptr, v_ptr, k_stride_s, v_stride_s, padding_before_ptr, length,
        start + num_interior * BLOCK_N, num_masked, qk_scale, seed, position_offset, batch_head, last_dropped,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION, NUM_STAGES,
    )  # fmt: skip

    # a split of which every key is padding has an lse of -inf and an out of 0
    acc *= tl.where(row_sum > 0, keep_scale / row_sum, 0.0)[:, None]
    # partial_out: [batch, heads, splits, max_globals, HEAD_DIM]; partial_lse has no HEAD_DIM
    partial_row = (batch_head.to(tl.int64) * num_splits + split) * max_globals + slot_start
    store_tile(partial_out_ptr + partial_row * HEAD_DIM, HEAD_DIM, acc, exists, HEAD_DIM, BLOCK_D)
    partial_lse_ptr += partial_row
    tl.store(partial_lse_ptr + tl.arange(0, BLOCK_M), log_sum_exp(row_sum, row_max), mask=exists)


@triton.jit(do_not_specialize=(*SIZES, "num_splits", "keys_per_split"))
def _merge_splits_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, seq_len_ptr, num_globals_ptr,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_h,
    heads, max_globals, num_splits, keys_per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of all splits for one slot, head and sequence."""
    slot, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    out_ptr += row_offset(batch, slot, head, out_stride_b, out_stride_s, out_stride_h)
    out_ptrs = out_ptr + tl.arange(0, BLOCK_D)
    lse_ptr += row_offset(batch, slot, head, lse_stride_b, 1, lse_stride_h)
    length = tl.load(seq_len_ptr + batch)  # 0 where all is padding: then no slot has a result
    if (slot >= tl.load(num_globals_ptr + batch)) | (length == 0):
        store_row(out_ptrs, tl.zeros([BLOCK_D], tl.float32), HEAD_DIM)
        tl.store(lse_ptr, float("inf"))
        return

    partial_row = (batch.to(tl.int64) * heads + head) * num_splits * max_globals + slot
    partial_out_ptr += partial_row * HEAD_DIM
    partial_lse_ptr += partial_row
    num_written = tl.cdiv(length, keys_per_split)
    all_splits = tl.arange(0, MAX_SPLITS)
    lse_of_splits = tl.load(
        partial_lse_ptr + all_splits * max_globals, mask=all_splits < num_written, other=float("-inf")
    )
    largest = tl.max(lse_of_splits, 0)
    lse = largest + tl.log(tl.sum(tl.exp(lse_of_splits - largest), 0))
    acc = tl.zeros([BLOCK_SPLITS, BLOCK_D], tl.float32)
    for start in range(0, num_written, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        partial_lse = tl.load(
            partial_lse_ptr + split.to(tl.int64) * max_globals, mask=split < num_written, other=float("-inf")
        )
        partial_out = load_splits(partial_out_ptr, split, max_globals, num_written, HEAD_DIM, BLOCK_D)
        acc += tl.exp(partial_lse - lse)[:, None] * partial_out
    store_row(out_ptrs, tl.sum(acc, 0), HEAD_DIM)
    tl.store(lse_ptr, lse)


def launch_global_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes global attention -> out, lse; softmax_scale is above 0."""
    q, mask = call.q, call.mask
    batch, max_globals, heads, head_dim = q.shape
    kernel = "global_forward" if max_globals <= 16 else "global_forward_many"
    config = configs.choose(kernel, q.dtype, head_dim, call.dropout_p)
    num_tiles = triton.cdiv(max_globals, config.block_m)
    num_splits, keys_per_split = split_keys(mask, heads, num_tiles, config.block_n)
    new = {"dtype": torch.float32, "device": q.device}
    out, lse = new_results(call, mask.is_packed)
    arguments = {
        **sequence_arguments(mask, q=q, k=call.k, v=call.v, out=out),
        **lse_arguments(lse=lse),
        **softmax_arguments(call),
        **block_arguments(config, q),
        "partial_out_ptr": torch.empty((batch, heads, num_splits, max_globals, head_dim), **new),
        "partial_lse_ptr": torch.empty((batch, heads, num_splits, max_globals), **new),
        "heads": heads,
        "num_splits": num_splits,
        "keys_per_split": keys_per_split,
        "BLOCK_SPLITS": _BLOCK_SPLITS,
        "MAX_SPLITS": MAX_SPLITS,
    }
    launch(_global_forward_kernel, (num_tiles * num_splits, heads, batch), arguments, config)
    launch(_merge_splits_kernel, (max_globals, heads, batch), arguments)
    return out, lse
