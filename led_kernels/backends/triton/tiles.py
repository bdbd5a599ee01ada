"""Tiles ``[rows, BLOCK_D]`` of tensors ``[batch, rows, heads, head_dim]``: where they start, their loads and stores.

Offsets of whole rows into memory are int64, offsets inside a tile int32, which ``launch.sequence_arguments`` keeps
small enough. BLOCK_D is head_dim rounded up to a power of two; what lies past head_dim is loaded as zeros and never
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from led_kernels.backends.triton.mask import load_global_positions


@triton.jit
def row_offset(batch, row, head, stride_b, stride_s, stride_h):
    """Computes the int64 offset at which a row of one head of ``[batch, rows, heads, …]`` starts."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tl.cast(row, tl.int64) * stride_s


@triton.jit
def tile_offsets(stride_s, NUM_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Computes the offsets ``[NUM_ROWS, BLOCK_D]`` of neighboring rows' elements from the first row's start."""
    return tl.arange(0, NUM_ROWS)[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(
    ptr, stride_s, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Loads ``[len(rows_exist), BLOCK_D]`` from the row at the pointer on: :func:`load_rows`, for neighboring rows."""
    offsets = tile_offsets(stride_s, rows_exist.shape[0], BLOCK_D)
    return load_rows(ptr, offsets, rows_exist, HEAD_DIM, BLOCK_D, CHECK_ROWS)


@triton.jit
def load_rows(
    ptr, offsets, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Loads ``[rows, BLOCK_D]`` at ``ptr + offsets``: with ``CHECK_ROWS`` as zeros where rows do not exist."""
    if HEAD_DIM == BLOCK_D:
        if CHECK_ROWS:
            x = tl.load(ptr + offsets, mask=rows_exist[:, None], other=0.0)
        else:
            x = tl.load(ptr + offsets)
    else:
        in_head = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if CHECK_ROWS:
            x = tl.load(ptr + offsets, mask=rows_exist[:, None] & in_head, other=0.0)
        else:
            x = tl.load(ptr + offsets, mask=in_head, other=0.0)
    return x


@triton.jit
def load_global_keys(
    slot, global_index_ptr, num_globals, k_ptr, v_ptr, k_stride_s, v_stride_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gathers the global keys of the slots from k and v of one head, whose first rows the pointers point to.

    Returns:
        key: the keys' positions, ``[slots]``.
        exists: whether a slot holds a global token.
        k, v: ``[slots, BLOCK_D]``, zeros for slots that hold none.
    """
    exists = slot < num_globals
    key = load_global_positions(global_index_ptr, slot, num_globals)
    row = key.to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    k = load_rows(k_ptr, row * k_stride_s + offs_d, exists, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, row * v_stride_s + offs_d, exists, HEAD_DIM, BLOCK_D, True)
    return key, exists, k, v


@triton.jit
def load_queries(
    q_ptr, out_ptr, d_out_ptr, d_lse_ptr, q_stride_s, out_stride_s, d_out_stride_s, lse_offsets, rows_exist,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loads what the backward needs of a tile of queries, whose first rows the pointers but ``d_lse_ptr`` point to.

    Args:
        d_lse_ptr: the start of lse's gradient, in which ``lse_offsets`` are the queries; None without such a gradient.

    Returns:
        q, d_out: ``[BLOCK_M, BLOCK_D]``, zeros for rows that do not exist.
        delta: fp32 ``[BLOCK_M]``, row sums of ``out * d_out`` less the gradient of lse; 0 for rows that do not exist.
    """
    q = load_tile(q_ptr, q_stride_s, rows_exist, HEAD_DIM, BLOCK_D, True)
    out = load_tile(out_ptr, out_stride_s, rows_exist, HEAD_DIM, BLOCK_D, True)
    d_out = load_tile(d_out_ptr, d_out_stride_s, rows_exist, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + lse_offsets, mask=rows_exist, other=0.0)
    return q, d_out, delta


@triton.jit
def store_tile(ptr, stride_s, x, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes ``x`` ``[len(rows_exist), BLOCK_D]`` to those rows from the pointer on that exist."""
    store_rows(ptr, tile_offsets(stride_s, rows_exist.shape[0], BLOCK_D), x, rows_exist, HEAD_DIM, BLOCK_D)


@triton.jit
def store_rows(ptr, offsets, x, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes ``x`` ``[rows, BLOCK_D]`` to those rows at ``ptr + offsets`` that exist."""
    mask = rows_exist[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_row(ptrs, x, HEAD_DIM: tl.constexpr):
    """Writes ``x`` ``[BLOCK_D]`` to the row whose elements the pointers ``[BLOCK_D]`` point to."""
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=tl.arange(0, x.shape[0]) < HEAD_DIM)
