"""Reports that a model has computed infinity or NaN."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Says that a number overflowed while one batch of documents was read; other batches may be sound."""


def check_finite(states: Tensor, dtype: torch.dtype) -> None:
    """Checks that all of ``states``, which a model computed in ``dtype``, are finite or, for bool, true.

    Raises:
        NotFinite: when one is not.
    """
    if bool(states.isfinite().all() if states.is_floating_point() else states.all()):
        return
    remedy = "give a sound checkpoint, for no weights of this size were trained"
    if dtype == torch.float16:
        remedy = "load it in float32 or bfloat16, by dtype or --dtype"
    raise NotFinite(f"the model's numbers overflowed {str(dtype).removeprefix('torch.')}; {remedy}.")
