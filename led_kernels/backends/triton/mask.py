"""Kernels read a ``LongformerMask`` by these functions: where a sequence lies, what its band needs, what is padding.

Positions are relative to their sequence and int32. Those of dropout alone are positions in the whole sequence, of which
the rows may be a piece: a row stands at ``position_offset`` further on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from led_kernels import mask_tensors

PADDING = tl.constexpr(mask_tensors.PADDING)
LOCAL = tl.constexpr(mask_tensors.LOCAL)


@triton.jit
def locate_sequence(batch, seq_start_ptr, seq_len_ptr, mask_stride_b):
    """Finds the rows of sequence ``batch``.

    Returns:
        first_row: int64, the sequence's first row in its batch entry of q, k and v.
        mask_row: int64, its first row in the mask's tensors.
        length: how many positions it has.
        num_rows: how many rows are its own to write; a padded batch has some past ``length``.
    """
    first_row = tl.load(seq_start_ptr + batch).to(tl.int64)
    length = tl.load(seq_len_ptr + batch)
    mask_row = batch.to(tl.int64) * mask_stride_b + first_row
    num_rows = tl.where(mask_stride_b == 0, length, mask_stride_b)  # 0: the sequences are packed
    return first_row, mask_row, length, num_rows


@triton.jit
def band_tiles(tile_start, length, before, after, BLOCK: tl.constexpr, NEIGHBOR_BLOCK: tl.constexpr):
    """Finds the tiles that hold the neighbors of the positions ``tile_start … tile_start + BLOCK - 1`` in the band.

    Position i has the neighbors ``i - before … i + after`` that lie in ``0 … length - 1``. The neighbors of queries are
    keys, and before and after are the window's left and right; the neighbors of keys are queries, and before and after
    are its right and left.

    Returns:
        start, stop: the neighbors of all the positions together are ``start … stop - 1``; start is rounded down to a
            multiple of 4, which dropout needs.
        num_tiles: how many tiles of ``NEIGHBOR_BLOCK`` from start on cover them.
        num_left: how many of these, at the front, are masked because they begin before some position's neighbors do.
        num_interior: how many interior tiles follow those. All tiles behind them are masked.
    """
    start = tl.maximum(tile_start - before, 0) & -4
    stop = tl.minimum(tile_start + BLOCK + after, length)
    num_tiles = full_tiles(stop - start + NEIGHBOR_BLOCK - 1, NEIGHBOR_BLOCK)
    left_stop = tl.maximum(tile_start + BLOCK - 1 - before, start)
    num_left = tl.minimum(full_tiles(left_stop - start + NEIGHBOR_BLOCK - 1, NEIGHBOR_BLOCK), num_tiles)
    num_common = tl.minimum(tile_start + after + 1, length) - start  # they end where the first position's do
    num_interior = tl.maximum(full_tiles(num_common, NEIGHBOR_BLOCK) - num_left, 0)
    return start, stop, num_tiles, num_left, num_interior


@triton.jit
def full_tiles(num_positions, BLOCK: tl.constexpr):
    """Computes ``num_positions // BLOCK`` of a number that is not negative: a shift, which signed division is not."""
    return (num_positions.to(tl.uint32) // BLOCK).to(tl.int32)


@triton.jit
def tile_around_gap(i, gap_at, gap):
    """Returns the i-th tile of those that are left when the ``gap`` tiles from tile ``gap_at`` on are passed over."""
    return tl.where(i < gap_at, i, i + gap)


@triton.jit
def is_between(position, lower, upper):
    """Computes ``lower <= position <= upper`` as ``[len(lower), len(position)]``; upper is at least lower - 1.

    One unsigned comparison decides both.
    """
    return (position[None, :] - lower[:, None]).to(tl.uint32) < (upper - lower + 1).to(tl.uint32)[:, None]


@triton.jit
def band_mask(key, exists, lower, upper, HAS_PADDING: tl.constexpr):
    """Tells which keys of a masked tile each query sees, ``[queries, keys]``.

    Args:
        lower, upper: the band of each query, which ends with the sequence.
        exists: which keys exist and are not padding; it is read with ``HAS_PADDING`` alone.
    """
    visible = is_between(key, lower, upper)
    if HAS_PADDING:
        visible = visible & exists[None, :]
    return visible


@triton.jit
def key_exists(padding_before_ptr, key, length, HAS_PADDING: tl.constexpr):
    """Tells which keys lie before ``length`` and, with ``HAS_PADDING``, are not padding."""
    exists = key < length
    if HAS_PADDING:
        exists = is_token(padding_before_ptr, key, length)
    return exists


@triton.jit
def is_token(padding_before_ptr, position, length):
    """Tells which positions of the sequence whose ``padding_before`` starts at the pointer exist and are not padding.

    ``token_kind`` says the same, but loads of one byte that decide about an operand of a dot make Triton lay the
    operand out for elements of one byte, which ldmatrix cannot load.
    """
    before = tl.load(padding_before_ptr + position, mask=position < length, other=0)
    after = tl.load(padding_before_ptr + position + 1, mask=position + 1 < length, other=-1)
    return (before == after) | (position == length - 1)  # the last position is never padding


@triton.jit
def count_padding(token_kind_ptr, padding_before_ptr, mask_row, start, stop):
    """Counts how many of the positions ``start … stop - 1`` (at least one) are padding."""
    last = mask_row + stop - 1
    before = tl.load(padding_before_ptr + last) - tl.load(padding_before_ptr + mask_row + start)
    return before + (tl.load(token_kind_ptr + last) == PADDING).to(tl.int32)


@triton.jit
def count_local(token_kind_ptr, start, stop, BLOCK: tl.constexpr):
    """Counts the local tokens at ``start … stop - 1`` of the sequence whose ``token_kind`` starts at the pointer."""
    counts = tl.zeros([BLOCK], tl.int32)
    for block_start in range(start, stop, BLOCK):
        position = block_start + tl.arange(0, BLOCK)
        kind = tl.load(token_kind_ptr + position, mask=position < stop, other=PADDING)
        counts += (kind == LOCAL).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def load_global_positions(global_ptr, slot, num_globals):
    """Loads what ``global_index`` or ``global_position`` holds for the slots; 0 for slots that hold no token."""
    return tl.load(global_ptr + slot, mask=slot < num_globals, other=0)
