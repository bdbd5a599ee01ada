"""The jit pieces that the Triton kernels share: where a sequence lies, which tiles a band needs, softmax, dropout.

Positions are relative to their sequence and int32; offsets of whole rows into memory are int64, offsets inside a tile
int32, which ``launch.sequence_arguments`` keeps small enough. Scores are kept in units of log2, so that the exponential
is one ``ex2`` and the scale folds into one FMA.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The running maximum of a row that has seen no key: finite, so that no difference of maxima is inf - inf.
NO_KEY = tl.constexpr(-3.0e38)

# Arguments that differ from call to call. Triton would compile again for each one that is 1 or divisible by 16.
SIZES = (
    "mask_stride_b",
    "lse_stride_b",
    "lse_stride_h",
    "heads",
    "max_globals",
    "window_left",
    "window_right",
    "last_dropped",
)


@triton.jit
def locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b):
    """Where sequence ``batch`` lies.

    Returns:
        first_row (int64, in its batch entry), mask_row (int64, in the mask's tensors), length, and num_rows: the rows
        that are this sequence's to write, past ``length`` too when the batch is padded.
    """
    first_row = tl.load(seq_start_ptr + batch).to(tl.int64)
    length = tl.load(seq_len_ptr + batch)
    mask_row = batch.to(tl.int64) * mask_stride_b + first_row
    num_rows = tl.where(mask_stride_b == 0, length, mask_stride_b)  # packed: 0
    return first_row, mask_row, length, num_rows


@triton.jit
def band_tiles(row_start, length, before, after, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The column tiles that rows ``row_start … row_start + BLOCK_ROWS - 1`` of a band need.

    Row i sees the columns ``i - before … i + after`` that lie in ``0 … length - 1``. With rows and columns as queries
    and keys, before and after are the window's left and right; the other way round they are its right and left.

    Returns:
        start, stop: the columns ``start … stop - 1`` that some row sees; start is a multiple of 4, for dropout.
        num_tiles: how many tiles from start on cover them.
        num_left: tiles at the front that some row does not see from their first column on.
        num_interior: tiles behind those whose every column exists and is seen by every row.
    """
    start = tl.maximum(row_start - before, 0) & -4
    stop = tl.minimum(row_start + BLOCK_ROWS + after, length)
    num_tiles = full_tiles(stop - start + BLOCK_COLUMNS - 1, BLOCK_COLUMNS)
    left_stop = tl.maximum(row_start + BLOCK_ROWS - 1 - before, start)
    num_left = tl.minimum(full_tiles(left_stop - start + BLOCK_COLUMNS - 1, BLOCK_COLUMNS), num_tiles)
    seen_by_all = tl.minimum(row_start + after + 1, length) - start
    num_interior = tl.maximum(full_tiles(seen_by_all, BLOCK_COLUMNS) - num_left, 0)
    return start, stop, num_tiles, num_left, num_interior


@triton.jit
def full_tiles(columns, BLOCK_COLUMNS: tl.constexpr):
    """``columns // BLOCK_COLUMNS`` where columns is not negative: a shift, which a signed division is not."""
    return (columns.to(tl.uint32) // BLOCK_COLUMNS).to(tl.int32)


@triton.jit
def is_between(columns, lower, upper):
    """``lower <= column <= upper``, ``[rows, columns]``, in one unsigned compare; upper is at least lower - 1."""
    return (columns[None, :] - lower[:, None]).to(tl.uint32) < (upper - lower + 1).to(tl.uint32)[:, None]


@triton.jit
def is_token(padding_before_ptr, position, length):
    """Which positions of the sequence whose ``padding_before`` starts at the pointer are not padding.

    Not from ``token_kind``: loads of one byte that decide about an operand of a dot make Triton lay the operand out for
    elements of one byte, which ldmatrix cannot load.
    """
    before = tl.load(padding_before_ptr + position, mask=position < length, other=0)
    after = tl.load(padding_before_ptr + position + 1, mask=position + 1 < length, other=-1)
    return (before == after) | (position == length - 1)  # the last position is never padding


@triton.jit
def count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop):
    """How many of the positions ``start … stop - 1`` (at least one) are padding."""
    last = mask_row + stop - 1
    before = tl.load(padding_before_ptr + last) - tl.load(padding_before_ptr + mask_row + start)
    return before + (tl.load(token_kind_ptr + last) == 0).to(tl.int32)


@triton.jit
def has_global(global_index_ptr, num_globals, start, stop):
    """Whether one of the sequence's global tokens, which ascend, lies at ``start … stop - 1``."""
    low, high = num_globals * 0, num_globals
    while low < high:  # low: the first that does not lie before start
        middle = (low + high) // 2
        is_before = tl.load(global_index_ptr + middle) < start
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return tl.load(global_index_ptr + low, mask=low < num_globals, other=stop) < stop


@triton.jit
def load_rows(
    ptr, offsets, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """``[rows, BLOCK_D]`` at ``ptr + offsets``, zeros past head_dim and, if ``CHECK_ROWS``, where no row exists."""
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
def store_rows(ptr, offsets, x, rows_exist, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes ``x`` ``[rows, BLOCK_D]`` to the rows that exist."""
    mask = rows_exist[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax_update(scores, acc, row_sum, row_max, qk_scale):
    """One step of the online softmax over the columns of ``scores`` (-inf where not allowed).

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Returns:
        probabilities (relative to the new maximum), and acc, row_sum, row_max brought up to date.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
    p = tl.math.exp2(scores * qk_scale - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    return p, acc * rescale[:, None], row_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def keep_of_block(
    seed, query, key_start, batch_head, stream, last_dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which probabilities of queries ``[BLOCK_M]`` and the keys from ``key_start`` (a multiple of 4) dropout keeps.

    One Philox draw serves four neighbouring keys, so a quarter of the block is drawn and its lanes interleaved.
    """
    group = key_start // 4 + tl.arange(0, BLOCK_N // 4)
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, group[None, :] + zeros, query[:, None] + zeros, batch_head + zeros, stream + zeros
    )
    even = tl.interleave(lane_0 > last_dropped, lane_2 > last_dropped)
    odd = tl.interleave(lane_1 > last_dropped, lane_3 > last_dropped)
    return tl.interleave(even, odd)


@triton.jit
def keep_of_keys(
    seed, query, key, batch_head, stream, last_dropped, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which probabilities of queries ``[BLOCK_M]`` and any keys ``[BLOCK_N]`` dropout keeps."""
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    lane_0, lane_1, lane_2, lane_3 = tl.philox(
        seed, (key // 4)[None, :] + zeros, query[:, None] + zeros, batch_head + zeros, stream + zeros
    )
    lane = (key % 4)[None, :]
    low, high = tl.where(lane == 0, lane_0, lane_1), tl.where(lane == 2, lane_2, lane_3)
    return tl.where(lane < 2, low, high) > last_dropped
