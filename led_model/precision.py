"""Tells in which dtype operations compute, where that is not the dtype of their arguments."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that autocast converts to on ``device``, or ``None`` where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # autocast does not know meta
        return None
    return torch.get_autocast_dtype(device.type)
