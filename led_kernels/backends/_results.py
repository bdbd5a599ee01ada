"""Memory for what the kernels write. A row of packed tensors that belongs to no sequence is written by none of them."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.call_checks import lse_dtype
from led_kernels.mask import LongformerMask


def new_results(q: Tensor, lse_shape: tuple[int, ...], mask: LongformerMask) -> tuple[Tensor, Tensor]:
    """out like q, and lse; of a packed mask, which may leave rows to no sequence, zeros and +inf."""
    dtype, device = lse_dtype(q.dtype), q.device
    if mask.is_packed:
        out = torch.zeros(q.shape, dtype=q.dtype, device=device)
        return out, torch.full(lse_shape, float("inf"), dtype=dtype, device=device)
    return torch.empty(q.shape, dtype=q.dtype, device=device), torch.empty(
        lse_shape, dtype=dtype, device=device
    )


def new_gradients(inputs: tuple[Tensor, ...], mask: LongformerMask) -> tuple[Tensor, ...]:
    """One like each input; of a packed mask zeros."""
    new = torch.zeros if mask.is_packed else torch.empty
    return tuple(new(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
