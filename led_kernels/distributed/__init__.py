"""Models run over several devices: documents are split over the ranks of a mesh."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from led_kernels.distributed.split_attention import (
        context_parallel_attention as context_parallel_attention,
    )
    from led_kernels.distributed.split_model import context_parallel as context_parallel

# The module of each name, which is imported when the name is asked for: attention, which needs no mesh of devices,
# imports modules of this package.
_HOMES = {"context_parallel": "split_model", "context_parallel_attention": "split_attention"}

__all__ = ["context_parallel", "context_parallel_attention"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
