"""A sequence is cut here into parts, one a rank, and each part into pieces that today's kernels compute.

A rank computes the rows of its part as queries. Their keys are those rows, the *halo*, which are rows of its neighbors
that the window reaches, and the global tokens, wherever they are. A piece is laid out as a sequence of its own::

    [ global tokens from elsewhere | gap | left halo | own rows | right halo ]

Rows of the halo are of kind HALO: keys, never queries. The gap keeps the global tokens in front out of every window,
and rows at positions of the whole sequence that are equal modulo 4, as dropout draws for four neighboring keys at once.

Queries whose window lies in the part need no halo, so a long part is one main piece without any, and two strips along
its edges, which wait for the halo. The sum of the three is the work of one piece: each query is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from led_kernels.mask_tensors import GLOBAL, HALO, LOCAL, PADDING, MaskTensors, build_tensors
from led_kernels.philox import KEYS_PER_DRAW

Mask = TypeVar("Mask")


@dataclass(frozen=True)
class Piece(Generic[Mask]):
    """Holds the mask of a piece, and which rows of the sequence it is made of.

    Attributes:
        mask: of ``front + stop_key - first_key`` rows.
        queries: first and last + 1 of the rows that are computed.
        keys: first and last + 1 of the rows that follow the front.
        front: rows before these: a row for each slot of the whole mask's ``global_index``, then the gap.
    """

    mask: Mask
    queries: tuple[int, int]
    keys: tuple[int, int]
    front: int

    @property
    def own_rows(self) -> slice:
        """Returns where the queries lie among the rows of the piece."""
        first, last = self.queries
        return slice(self.front + first - self.keys[0], self.front + last - self.keys[0])


@dataclass(frozen=True)
class MaskShard(Generic[Mask]):
    """Holds what one rank needs to know of a sequence that is split over ``world`` ranks, for one window.

    Attributes:
        rank: whose part this is.
        bounds: where the ranks' parts begin, and the end: part r is rows ``bounds[r]`` to ``bounds[r + 1]``.
        window: ``(left, right)``.
        main: the piece whose keys are the whole part, and the halo too if there are no strips.
        strips: the pieces along the part's edges, which need the halo.
        keys: mask of the own rows as keys of global attention, whose queries are all global tokens of the sequence;
            its ``global_index`` has the rows of those in the part, and -1 for the others.
    """

    rank: int
    bounds: tuple[int, ...]
    window: tuple[int, int]
    main: Piece[Mask]
    strips: tuple[Piece[Mask], ...]
    keys: Mask

    @property
    def world(self) -> int:
        return len(self.bounds) - 1

    @property
    def seqlen(self) -> int:
        """Returns the number of rows of all parts."""
        return self.bounds[-1]

    @property
    def own(self) -> tuple[int, int]:
        """Returns the first and the last + 1 of the own rows."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]


def even_bounds(seqlen: int, world: int) -> tuple[int, ...]:
    """Returns where parts of ``seqlen`` rows begin, which differ by 4 rows at most, and the end.

    Raises:
        ValueError: when a rank would have no rows.
    """
    blocks = -(-seqlen // KEYS_PER_DRAW)
    if blocks < world:
        raise ValueError(
            f"a sequence of {seqlen} rows cannot be split over {world} ranks, in blocks of {KEYS_PER_DRAW} rows; pad "
            f"it to more than {KEYS_PER_DRAW * (world - 1)} rows, or use fewer ranks."
        )
    return *(KEYS_PER_DRAW * (blocks * rank // world) for rank in range(world)), seqlen


def check_bounds(bounds: tuple[int, ...], world: int, seqlen: int) -> None:
    """Checks where parts begin.

    Raises:
        ValueError: unless they ascend from 0 to ``seqlen`` by multiples of 4.
    """
    if (
        len(bounds) != world + 1
        or bounds[0] != 0
        or bounds[-1] != seqlen
        or any(first >= last for first, last in pairwise(bounds))
        or any(bound % KEYS_PER_DRAW for bound in bounds[:-1])
    ):
        raise ValueError(
            f"bounds is {bounds} for {world} ranks and {seqlen} rows; give {world + 1} ascending numbers from 0 to "
            f"{seqlen}, multiples of {KEYS_PER_DRAW} but the last."
        )


def shard_mask(
    tensors: MaskTensors,
    rank: int,
    bounds: tuple[int, ...],
    window: tuple[int, int],
    build: Callable[[MaskTensors, int], Mask],
) -> MaskShard[Mask]:
    """Returns the part of ``rank`` of a padded batch; nothing waits for a device.

    Args:
        tensors: of the mask of the whole sequences, ``token_kind`` is ``[batch, seqlen]``.
        bounds: as :func:`check_bounds` wants them.
        window: ``(left, right)``, each 0 … seqlen.
        build: makes a mask of its tensors and its number of rows.
    """
    first, last = bounds[rank], bounds[rank + 1]
    left, right = window
    seqlen = bounds[-1]
    # A strip begins where the window reaches into another part; at an end of the sequence there is none.
    head = first + left if rank > 0 else first
    tail = last - right if rank < len(bounds) - 2 else last
    if head < tail:
        main = _cut(tensors, (head, tail), (first, last), window, build)
        strips = [(a, b) for a, b in ((first, head), (tail, last)) if a < b]
    else:
        main = _cut(tensors, (first, last), _reach((first, last), window, seqlen), window, build)
        strips = []
    return MaskShard(
        rank,
        bounds,
        window,
        main,
        tuple(_cut(tensors, rows, _reach(rows, window, seqlen), window, build) for rows in strips),
        _own_keys(tensors, (first, last), build),
    )


def _reach(queries: tuple[int, int], window: tuple[int, int], seqlen: int) -> tuple[int, int]:
    """Returns the rows that the windows of queries reach, which exist."""
    return max(queries[0] - window[0], 0), min(queries[1] + window[1], seqlen)


def _cut(
    tensors: MaskTensors,
    queries: tuple[int, int],
    keys: tuple[int, int],
    window: tuple[int, int],
    build: Callable[[MaskTensors, int], Mask],
) -> Piece[Mask]:
    """Returns the piece of these rows as queries and those as keys."""
    batch, max_globals = tensors.global_index.shape
    device = tensors.token_kind.device
    front = 0
    if max_globals > 0:  # The window of the first query ends after the global tokens in front.
        front = max_globals + max(window[0] - (queries[0] - keys[0]), 0)
    front += (keys[0] - front) % KEYS_PER_DRAW
    offset = keys[0] - front  # What is added to a row of the piece gives its position in the sequence.

    index = tensors.global_index.long()
    slot = torch.arange(max_globals, device=device)
    exists = slot < tensors.num_globals[:, None]  # bool [batch, max_globals]
    is_inside = (index >= keys[0]) & (index < keys[1])
    row = torch.where(is_inside, index - offset, slot)
    row = torch.where(exists, row, front + keys[1] - keys[0])
    row, order = row.sort(dim=1)  # Global tokens from elsewhere come first.

    position = torch.arange(*keys, device=device)
    is_query = (position >= queries[0]) & (position < queries[1])
    kind = tensors.token_kind[:, keys[0] : keys[1]]
    kind = torch.where((kind == LOCAL) & ~is_query, HALO, kind)
    in_front = torch.where(exists & ~is_inside, GLOBAL, PADDING).to(kind.dtype)
    gap = kind.new_full((batch, front - max_globals), PADDING)
    kind = torch.cat([in_front, gap, kind], 1)  # uint8 [batch, rows]
    rows = kind.shape[1]
    seq_len = torch.where(kind != PADDING, torch.arange(1, rows + 1, device=device), 0).amax(1)
    built = build_tensors(
        kind,
        torch.zeros_like(seq_len),
        seq_len,
        row,
        tensors.num_globals.long(),
        max_globals,
        position_offset=offset,
        global_position=index.gather(1, order),
    )
    return Piece(build(built, rows), queries, keys, front)


def _own_keys(tensors: MaskTensors, own: tuple[int, int], build: Callable[[MaskTensors, int], Mask]) -> Mask:
    """Returns the mask of own rows as keys of global attention, which looks at no other row's kind."""
    kind = tensors.token_kind[:, slice(*own)]
    rows = kind.shape[1]
    seq_len = torch.where(kind != PADDING, torch.arange(1, rows + 1, device=kind.device), 0).amax(1)
    index = tensors.global_index.long()
    built = build_tensors(
        kind,
        torch.zeros_like(seq_len),
        seq_len,
        torch.where((index >= own[0]) & (index < own[1]), index - own[0], -1),
        tensors.num_globals.long(),
        index.shape[1],
        position_offset=own[0],
        global_position=index,
    )
    return build(built, rows)
