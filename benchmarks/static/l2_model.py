"""Bytes that the banded forward moves between memory and L2, by count.

The model: blocks start in launch order, tiles of one head first, as many at once as the GPU holds, and walk their tiles
in step; a block that ends makes room for the next. Reads go through one fully associative LRU cache of pieces of 16
rows. Its capacity is half of the GPU's L2, since the two partitions of A100 and H100 may each hold a copy and results
pass through it too. Each row of out and lse is written once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from benchmarks.harness.shapes import Shape

PIECE = 16
"""Rows of one head of k or v that are cached together."""


def traffic_ratio(
    shape: Shape, block_m: int, block_n: int, resident: int, l2: int, element_size: int = 2
) -> float:
    """Bytes moved over the bytes of q, k, v and out, once each.

    Args:
        resident: blocks that the GPU holds at once.
        l2: size of its second-level cache in bytes.
    """
    row_bytes = shape.head_dim * element_size
    capacity = l2 // 2 // (PIECE * row_bytes)
    cache: OrderedDict[tuple[int, str, int], None] = OrderedDict()
    tiles = -(-shape.seqlen // block_m)
    waiting = deque((head, tile) for head in range(shape.heads) for tile in range(tiles))
    running = deque(
        _reads(shape, *waiting.popleft(), block_m, block_n) for _ in range(min(resident, len(waiting)))
    )
    pieces_read = 0
    while running:
        block = running.popleft()
        step = next(block, None)
        if step is None:
            if waiting:
                running.append(_reads(shape, *waiting.popleft(), block_m, block_n))
            continue
        running.append(block)
        for piece in step:
            if piece in cache:
                cache.move_to_end(piece)
                continue
            pieces_read += 1
            cache[piece] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    rows = shape.seqlen * shape.heads
    once = 4 * rows * row_bytes
    q_out_lse = 2 * rows * row_bytes + 4 * rows
    return (pieces_read * PIECE * row_bytes + q_out_lse) / once


def _reads(
    shape: Shape, head: int, tile: int, block_m: int, block_n: int
) -> Iterator[list[tuple[int, str, int]]]:
    """Pieces of k and v that a block reads, tile by tile: global tokens first, then the band."""
    yield [(head, name, row // PIECE) for row in shape.global_index for name in "kv"]
    start = max(tile * block_m - shape.window, 0)
    stop = min(tile * block_m + block_m + shape.window, shape.seqlen)
    for key in range(start, stop, block_n):
        last = min(key + block_n, stop) - 1
        yield [(head, name, i) for name in "kv" for i in range(key // PIECE, last // PIECE + 1)]
