"""Rows at the edges of a rank's part travel to its neighbors here, and their gradients travel back.

Both directions run beside computation: an exchange is started, something else is computed, and then it is waited for.
In the backward, which goes through these steps in reverse, the gradients are sent when those of the strips along the
edges are there, and are waited for after the main piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from led_kernels.first_order import first_order_only
from led_kernels.mask_shard import MaskShard


class Halo:
    """An exchange under way of the rows that the windows of neighbors reach.

    A window may reach over several ranks' parts, of any sizes.
    """

    def __init__(self, tensors: Sequence[Tensor], shard: MaskShard, group: dist.ProcessGroup) -> None:
        """Starts the exchange.

        Args:
            tensors: the own rows of each, ``[batch, rows, ...]``, of one dtype.
            shard: says which rows are wanted where.
            group: the ranks among which the sequence is split.
        """
        self.group = group
        self.rank = shard.rank
        self.shapes = [x.shape for x in tensors]
        self.sends, self.receives = routes(shard)
        self.splits = [[self._numel(rows) for rows in routes] for routes in (self.sends, self.receives)]
        self.work: dist.Work | None = None
        self.returned: Tensor | None = None  # gradients of the rows that were sent, once they are back
        self._received: Tensor | None = _Start.apply(self, *tensors)

    def wait(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the rows to the left and to the right of the own ones, ``[batch, any, ...]``, of each tensor."""
        received, self._received = self._received, None
        halos = _Wait.apply(self, received)
        return list(zip(halos[::2], halos[1::2], strict=True))

    def exchange(self, flat: Tensor, *, back: bool) -> Tensor:
        """Starts to send ``flat``, and returns where what arrives will be, once ``work`` is done."""
        sent, received = reversed(self.splits) if back else self.splits
        arriving = flat.new_zeros(sum(received))
        self.work = dist.all_to_all_single(arriving, flat, received, sent, group=self.group, async_op=True)
        return arriving

    def finish(self) -> None:
        """Waits until the exchange that was started last is done."""
        work, self.work = self.work, None  # It holds the memory of what was sent.
        assert work is not None  # as an exchange is started before it is waited for
        work.wait()

    def _numel(self, rows: tuple[int, int]) -> int:
        return sum(shape.numel() // max(shape[1], 1) for shape in self.shapes) * (rows[1] - rows[0])

    def pack(self, tensors: Sequence[Tensor], routes: Sequence[tuple[int, int]]) -> Tensor:
        """Returns rows ``first … last - 1`` of each tensor for each route, one after another."""
        parts = [x[:, first:last].flatten() for first, last in routes for x in tensors]
        return torch.cat(parts)

    def unpack(self, flat: Tensor, routes: Sequence[tuple[int, int]]) -> list[list[Tensor]]:
        """Returns for each route the rows of each tensor, views of ``flat`` as :meth:`pack` makes it."""
        found, begin = [], 0
        for first, last in routes:
            rows = []
            for batch, _, *rest in self.shapes:
                shape = (batch, last - first, *rest)
                end = begin + torch.Size(shape).numel()
                rows.append(flat[begin:end].view(shape))
                begin = end
            found.append(rows)
        return found


def routes(shard: MaskShard) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns for each rank which of the own rows it gets, and which of its rows are wanted here.

    The latter count from the start of the left halo, and are without the own rows.
    """
    left, right = shard.window
    bounds, (first, last) = shard.bounds, shard.own

    def common(a: tuple[int, int], b: tuple[int, int], origin: int) -> tuple[int, int]:
        begin, end = max(a[0], b[0]), min(a[1], b[1])
        return (begin - origin, end - origin) if begin < end else (0, 0)

    sends, receives = [], []
    for rank, part in enumerate(pairwise(bounds)):
        if rank == shard.rank:
            sends.append((0, 0))
            receives.append((0, 0))
        elif rank < shard.rank:
            sends.append(common((first, last), (part[1], part[1] + right), first))
            receives.append(common(part, (first - left, first), 0))
        else:
            sends.append(common((first, last), (part[0] - left, part[0]), first))
            receives.append(common(part, (last, last + right), 0))
    return sends, receives


class _Start(torch.autograd.Function):
    """Sends rows; in the backward, which is the last step of the exchange, their gradients have come back."""

    @staticmethod
    def forward(ctx: Any, halo: Halo, *tensors: Tensor) -> Tensor:
        ctx.halo = halo
        return halo.exchange(halo.pack(tensors, halo.sends), back=False)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        halo: Halo = ctx.halo
        halo.finish()
        assert halo.returned is not None  # as the backward of _Wait has come before
        grads = [grad_outputs[0].new_zeros(shape) for shape in halo.shapes]
        for (first, last), rows in zip(halo.sends, halo.unpack(halo.returned, halo.sends), strict=True):
            for grad, row in zip(grads, rows, strict=True):
                grad[:, first:last] += row
        halo.returned = None
        return None, *grads


class _Wait(torch.autograd.Function):
    """Waits for the rows of others; in the backward, it starts to send their gradients back."""

    @staticmethod
    def forward(ctx: Any, halo: Halo, received: Tensor) -> tuple[Tensor, ...]:
        ctx.halo, ctx.size = halo, received.shape
        halo.finish()
        by_rank = halo.unpack(received, halo.receives)
        return tuple(
            torch.cat([rows[i] for rows in side], 1)
            for i in range(len(halo.shapes))
            for side in (by_rank[: halo.rank + 1], by_rank[halo.rank :])  # The own entry has no rows.
        )

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        halo: Halo = ctx.halo
        rank = halo.rank
        sizes = [last - first for first, last in halo.receives]
        parts = []
        for left, right in zip(grad_outputs[::2], grad_outputs[1::2], strict=True):
            parts.append([*left.split(sizes[: rank + 1], 1), *right.split(sizes[rank:], 1)[1:]])
        flat = torch.cat([x.flatten() for by_tensor in zip(*parts, strict=True) for x in by_tensor])
        halo.returned = halo.exchange(flat, back=True)
        # _Start takes what has come back; this only says that there is a gradient.
        return None, flat.new_zeros(()).expand(ctx.size)
