"""Memory for what kernels write; those of GPUs leave out the rows of packed tensors that belong to no sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.call_checks import lse_dtype


def new_results(q: Tensor, lse_shape: tuple[int, ...], has_gaps: bool) -> tuple[Tensor, Tensor]:
    """out like q, and lse; zeros and +inf if there may be rows of no sequence."""
    dtype, device = lse_dtype(q.dtype), q.device
    if has_gaps:
        out = torch.zeros(q.shape, dtype=q.dtype, device=device)
        return out, torch.full(lse_shape, float("inf"), dtype=dtype, device=device)
    return torch.empty(q.shape, dtype=q.dtype, device=device), torch.empty(
        lse_shape, dtype=dtype, device=device
    )


def new_gradients(inputs: tuple[Tensor, ...], has_gaps: bool) -> tuple[Tensor, ...]:
    """One like each input; zeros if there may be rows of no sequence."""
    new = torch.zeros if has_gaps else torch.empty
    return tuple(new(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
