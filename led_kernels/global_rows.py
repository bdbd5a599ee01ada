"""These functions gather the rows of the global tokens from a tensor with a row for every token, and put them back."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.eager import is_transformed
from led_kernels.mask import LongformerMask


def gather_global_rows(x: Tensor, mask: LongformerMask) -> Tensor:
    """Gathers rows of globals: ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` -> ``[batch, max_globals, ...]``.

    Unused slots repeat a row of the same batch entry.
    """
    position = mask.global_index.clamp(min=0).long()
    if mask.is_packed:
        return x[packed_rows(position, mask, x.shape[0])]
    return x[torch.arange(mask.batch, device=x.device)[:, None], position]


def add_global_rows(out: Tensor, out_global: Tensor, mask: LongformerMask) -> Tensor:
    """Merges ``[batch, max_globals, ...]`` into ``[batch, seqlen, ...]`` or ``[total_rows, ...]`` by addition.

    Exact, since each of the two holds zeros where the other holds a result. In place when no gradient is recorded.
    """
    position = mask.global_index.clamp(min=0).long()
    source = out_global.to(out.dtype)
    if mask.is_packed:
        at = (packed_rows(position, mask, out.shape[0]),)
    else:
        at = torch.arange(mask.batch, device=out.device)[:, None], position
    is_recorded = out.requires_grad or source.requires_grad or is_transformed()
    put = out.index_put if is_recorded else out.index_put_
    return put(at, source, accumulate=True)


def packed_rows(position: Tensor, mask: LongformerMask, total_rows: int) -> Tensor:
    """Returns the rows of a packed tensor at positions ``[batch, any]`` in their sequences."""
    return (mask.seq_start[:, None] + position).clamp(max=max(total_rows - 1, 0))
