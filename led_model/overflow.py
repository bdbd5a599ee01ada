"""What to say when a model has computed infinity or NaN."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Of the numbers of one batch of documents, which says nothing of others'."""


def check_finite(states: Tensor, dtype: torch.dtype) -> None:
    """Raises NotFinite when not all of ``states``, which a model computed in ``dtype``, are finite or true."""
    if bool(states.isfinite().all() if states.is_floating_point() else states.all()):
        return
    remedy = "give a sound checkpoint, for no weights of this size were trained"
    if dtype == torch.float16:
        remedy = "load it in float32 or bfloat16, by dtype or --dtype"
    raise NotFinite(f"the model's numbers overflowed {str(dtype).removeprefix('torch.')}; {remedy}.")
