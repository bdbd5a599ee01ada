"""These functions sum tensors over the ranks of a group, so that autograd knows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from led_kernels.first_order import first_order_only


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum of all ranks' ``x``, whose gradient is the sum of all ranks' gradients."""
    return _AllReduceSum.apply(x, group)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grad_outputs[0], ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=group)
    return y


def merge_over_ranks(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns attention over the keys of all ranks, from each rank's attention over its own.

    With ``w = exp(lse)`` it is ``Σ w out / Σ w``. Two collectives: one for the maximum, and one for both sums.

    Args:
        out: ``[batch, rows, heads, head_dim]``.
        lse: ``[batch, heads, rows]``, natural logarithm; infinite where a rank has no result.

    Returns:
        like ``out``; zeros where no rank has a result.
    """
    lse = lse.masked_fill(lse.isinf(), torch.finfo(lse.dtype).min)
    peak = lse.detach().clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    weight = (lse - peak).exp().transpose(1, 2)[..., None]  # [batch, rows, heads, 1]
    # A rank without a result has weight 0, except where no rank has one.
    total = all_reduce_sum(torch.cat([out * weight, weight], -1), group)
    return (total[..., :-1] / total[..., -1:]).to(out.dtype)


def own_rows(x: Tensor, own: slice, group: dist.ProcessGroup) -> Tensor:
    """Returns the own rows of ``x``, ``[batch, seqlen, ...]``, which every rank has whole.

    Each rank gets the gradient of all rows, so that what a caller has made ``x`` of learns the same on all ranks.
    """
    return _OwnRows.apply(x, own, group)


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: slice, group: dist.ProcessGroup) -> Tensor:
        ctx.shape, ctx.own, ctx.group = x.shape, own, group
        return x[:, own]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0].new_zeros(ctx.shape)
        # Every rank has a loss of its own, which are all the same: the mean of their gradients is that of one.
        grad[:, ctx.own] = grad_outputs[0] / dist.get_world_size(ctx.group)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


def gather_over_ranks(x: Tensor, bounds: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """Returns the rows of all ranks, ``[batch, bounds[-1], ...]``, of each rank's ``[batch, its rows, ...]``.

    Args:
        bounds: where the ranks' rows begin, and the end.
    """
    return _GatherOverRanks.apply(x, bounds, rank, group)


class _GatherOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.own = group, slice(bounds[rank], bounds[rank + 1])
        # Collectives want equal sizes: shorter parts are filled up, and cut afterwards.
        sizes = [last - first for first, last in pairwise(bounds)]
        padded = x.new_zeros(max(sizes), x.shape[0], *x.shape[2:])
        padded[: x.shape[1]] = x.transpose(0, 1)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).transpose(0, 1)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _summed(grad_outputs[0], ctx.group)[:, ctx.own], None, None, None
