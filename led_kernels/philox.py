"""Dropout draws its numbers by Philox4x32-10, implemented here on torch tensors.

The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Every backend drops the
same elements: probability ``(query, key)`` of head ``h`` in sequence ``b`` is kept iff lane
``key % 4`` of ``philox(counter=(key // 4, query, b * heads + h, stream), key=seed)`` is at least
``round(dropout_p * 2**32)``. Positions are those in the whole sequence, so that the pieces of one that is split drop
what the whole would: row ``i`` stands at ``i + position_offset[b]``, and a global token, as a query or as a key outside
of the window, at ``global_position[b, slot]``. Offsets are multiples of 4: one draw serves four neighboring rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

BANDED_STREAM, GLOBAL_STREAM = 0, 1
KEYS_PER_DRAW = 4  # Neighboring keys share a draw, so that pieces of a sequence begin at multiples of it.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Runs ten rounds on four 32-bit counters under a 64-bit key.

    All tensors are int64 and hold unsigned 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps mod 2**64, so both halves of the product come out right.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """Returns the smallest 32-bit draw that is kept."""
    return round(dropout_p * 2**32)


def keep_mask(
    seed: Tensor, query: Tensor, key: Tensor, batch_head: Tensor, stream: int, dropout_p: float
) -> Tensor:
    """Returns which attention probabilities dropout keeps.

    Args:
        seed: int64 ``[1]``, as drawn by the ops.
        query, key: int64 positions in their sequence; negative ones, which count nowhere, are taken mod 2**32.
        batch_head: int64 ``b * heads + h``; it broadcasts with ``query`` and ``key``.
        stream: ``BANDED_STREAM`` or ``GLOBAL_STREAM``.
        dropout_p: probability of dropping, 0 … 1.

    Returns:
        A bool tensor of the broadcast shape.
    """
    query, key, batch_head = (x.to(torch.int64) for x in (query, key, batch_head))
    # One draw could serve four neighboring keys; for simplicity each key has its own here.
    lanes = philox4x32(
        ((key // 4) & _LOW, query & _LOW, batch_head, torch.full_like(key, stream)),
        (seed & _LOW, (seed >> 32) & _LOW),
    )
    draw = lanes[3]
    for lane in (2, 1, 0):
        draw = torch.where(key % 4 == lane, lanes[lane], draw)
    return draw >= dropout_threshold(dropout_p)
