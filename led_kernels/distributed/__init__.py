"""Models run over several devices: documents are split over the ranks of a mesh, or heads and feed-forwards are."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from led_kernels.distributed.context import ContextParallelMask as ContextParallelMask
    from led_kernels.distributed.split_attention import (
        context_parallel_attention as context_parallel_attention,
    )
    from led_kernels.distributed.split_model import context_parallel as context_parallel
    from led_kernels.distributed.tensor_parallel import (
        clip_grad_norm_ as clip_grad_norm_,
    )
    from led_kernels.distributed.tensor_parallel import (
        full_state_dict as full_state_dict,
    )
    from led_kernels.distributed.tensor_parallel import (
        parallelize as parallelize,
    )

# The module of each name, which is imported when the name is asked for: attention, which needs no mesh of devices,
# imports modules of this package.
_HOMES = {
    "ContextParallelMask": "context",
    "clip_grad_norm_": "tensor_parallel",
    "context_parallel": "split_model",
    "context_parallel_attention": "split_attention",
    "full_state_dict": "tensor_parallel",
    "parallelize": "tensor_parallel",
}

__all__ = [
    "ContextParallelMask",
    "clip_grad_norm_",
    "context_parallel",
    "context_parallel_attention",
    "full_state_dict",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
