"""The gate lets no time be taken of a provider whose result is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference allowed, relative to the largest value of the tensor. fp32 comes out below 1e-5; one key
# too many or too few in a window of 1,025 shows as 1e-3. That is less than the rounding of bf16, whose gate is against
# gross errors: pytest --gpu looks closer.
TOLERANCE = 1e-4
TOLERANCES = {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.int64: 0.0}


class GateError(Exception):
    """Says that a provider's result differs from the truth."""


def check(name: str, result: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Returns the largest difference of ``result`` from ``truth``, relative to each tensor's largest value.

    Rows that are NaN in the truth are nobody's to define and not compared.

    Raises:
        GateError: when it exceeds its dtype's tolerance, or a tensor is missing or of another shape.
    """
    error = 0.0
    for key, actual in result.items():
        if key not in truth or truth[key].shape != actual.shape:
            raise GateError(f"{name}: {key} {tuple(actual.shape)} is not what the truth holds")
        expected, tolerance = truth[key], TOLERANCES[actual.dtype]
        defined = ~expected.isnan()
        difference = (actual.double() - expected)[defined].abs().max() / expected[defined].abs().max()
        if not difference <= tolerance:  # a NaN fails too
            raise GateError(
                f"{name}: {key} is off by {difference:.2e} of its largest value ({tolerance:.0e} allowed)"
            )
        error = max(error, float(difference))
    return error
