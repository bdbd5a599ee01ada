"""These functions gather the rows of the global tokens from a tensor with a row for every token, and put them back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from led_kernels.eager import is_eager, is_transformed
from led_kernels.mask import LongformerMask
from led_kernels.processes import replicated_beside


def gather_global_rows(x: Tensor, mask: LongformerMask) -> Tensor:
    """Gathers rows of globals: ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` -> ``[batch, max_globals, ...]``.

    Unused slots repeat a row of the same batch entry.
    """
    return x[replicated_beside(x, _places(mask, x.shape[0]))]


def add_global_rows(out: Tensor, out_global: Tensor, mask: LongformerMask) -> Tensor:
    """Merges ``[batch, max_globals, ...]`` into ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` by addition.

    Exact, since each of the two holds zeros where the other holds a result. ``out`` is overwritten, unless a program is
    compiled or transformed: whoever calls gives it up.
    """
    if is_eager(out, out_global):
        return _PutGlobalRows.apply(out, out_global, mask)
    put = (
        out.index_put if out.requires_grad or out_global.requires_grad or is_transformed() else out.index_put_
    )
    places = replicated_beside(out, _places(mask, out.shape[0]))
    return put(places, out_global.to(out.dtype), accumulate=True)


class _PutGlobalRows(torch.autograd.Function):
    """Writes into the memory of ``out`` behind autograd's back, so that no second tensor of its size is kept.

    Banded attention has kept ``out`` for its backward, in which the rows of global tokens have no part: their
    probabilities are 0, whatever was written.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, out_global: Tensor, mask: LongformerMask) -> Tensor:
        ctx.mask, ctx.dtype = mask, out_global.dtype
        places = _places(mask, out.shape[0])
        return out.data.index_put_(places, out_global.to(out.dtype), accumulate=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_merged,) = grad_outputs
        of_globals = gather_global_rows(d_merged, ctx.mask).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return d_merged, of_globals, None


def _places(mask: LongformerMask, num_rows: int) -> tuple[Tensor, ...]:
    """Returns the index of the global tokens' rows in a tensor with a row for every token."""
    position = mask.global_index.clamp(min=0).long()
    if mask.is_packed:
        return (packed_rows(position, mask, num_rows),)
    return torch.arange(mask.batch, device=position.device)[:, None], position


def packed_rows(position: Tensor, mask: LongformerMask, total_rows: int) -> Tensor:
    """Returns the rows of a packed tensor at positions ``[batch, any]`` in their sequences."""
    return (mask.seq_start[:, None] + position).clamp(max=max(total_rows - 1, 0))
