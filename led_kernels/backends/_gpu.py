"""What both GPU backends do before they launch."""

from __future__ import annotations

import math

from torch import Tensor

from led_kernels.mask import LongformerMask

_MAX_GRID = 65535  # of a grid's second and third dimensions


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float, float]:
    """``scale * q`` as ``|scale| * (sign * q)``: the kernels take the row maximum before they scale.

    Returns:
        q with the sign, the sign (0 for a scale of 0, whose q becomes 0), and the scale to use.
    """
    if softmax_scale > 0:
        return q, 1.0, softmax_scale
    sign = math.copysign(1.0, softmax_scale) if softmax_scale else 0.0
    return q * sign, sign, abs(softmax_scale) or 1.0


def check_grid(mask: LongformerMask, heads: int) -> None:
    """Refuses what no grid holds.

    Raises:
        ValueError: too many sequences or heads.
    """
    for count, what, remedy in (
        (mask.batch, "mask has {} sequences", "split the batch"),
        (heads, "q has {} heads", "split the heads"),
    ):
        if count > _MAX_GRID:
            raise ValueError(f"{what.format(count)}, a launch serves at most {_MAX_GRID:,}; {remedy}.")
