"""These functions allocate what kernels write; GPU kernels leave out rows of packed tensors that no sequence has."""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.call import AttentionCall, lse_dtype


def new_results(call: AttentionCall, has_gaps: bool) -> tuple[Tensor, Tensor]:
    """Allocates out and lse of a call; zeros and +inf if there may be rows of no sequence."""
    q, dtype = call.q, lse_dtype(call.q.dtype)
    if has_gaps:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        return out, torch.full(call.lse_shape, float("inf"), dtype=dtype, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(call.lse_shape, dtype=dtype, device=q.device)


def new_gradients(call: AttentionCall, has_gaps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates dq, dk and dv of a call, contiguous; zeros if there may be rows of no sequence."""
    new = torch.zeros if has_gaps else torch.empty
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
    return dq, dk, dv
