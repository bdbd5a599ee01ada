"""Both GPU backends launch through these functions, which see to the device, a grid's limits and the scale's sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from led_kernels.call import AttentionCall

_MAX_GRID = 65535  # of a grid's second and third dimensions


def run_forward(
    launch: Callable[[AttentionCall], tuple[Tensor, Tensor]], call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Runs ``launch(call)`` on the device of the call, with a softmax_scale above 0.

    Raises:
        ValueError: for more sequences or heads than a grid holds.
    """
    check_grid(call)
    call, _ = with_positive_scale(call)
    with torch.cuda.device_of(call.q):
        return launch(call)


def run_backward(
    launch: Callable[..., tuple[Tensor, Tensor, Tensor]],
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs ``launch(call, out, lse, d_out, d_lse)`` under the same conditions -> dq, dk, dv."""
    check_grid(call)
    call, sign = with_positive_scale(call)
    with torch.cuda.device_of(call.q):
        dq, dk, dv = launch(call, out, lse, d_out, d_lse)
    return (dq if sign == 1 else dq * sign), dk, dv


def with_positive_scale(call: AttentionCall) -> tuple[AttentionCall, float]:
    """Writes ``scale * q`` as ``|scale| * (sign * q)``, for the kernels take the row maximum before they scale.

    Returns:
        The call with the sign in q, and the sign; it is 0 for a scale of 0, whose q becomes 0.
    """
    scale = call.softmax_scale
    if scale > 0:
        return call, 1.0
    sign = math.copysign(1.0, scale) if scale else 0.0
    return replace(call, q=call.q * sign, softmax_scale=abs(scale) or 1.0), sign


def check_grid(call: AttentionCall) -> None:
    """Refuses what no grid holds.

    Raises:
        ValueError: for too many sequences or heads.
    """
    for count, what, remedy in (
        (call.mask.batch, "mask has {} sequences", "split the batch"),
        (call.heads, "q has {} heads", "split the heads"),
    ):
        if count > _MAX_GRID:
            raise ValueError(f"{what.format(count)}, a launch serves at most {_MAX_GRID:,}; {remedy}.")
