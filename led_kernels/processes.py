"""These functions serve models that several processes train: DistributedDataParallel and FSDP of torch."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Model(Protocol):
    """Consists of modules."""

    def modules(self) -> Iterator[nn.Module]:
        """Yields the model and all modules in it, the outermost first."""


def processes_share_gradients() -> bool:
    """Tells whether other processes may wait for the gradients that are recorded here."""
    distributed = torch.distributed
    return (
        torch.is_grad_enabled()
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def is_dtensor(x: object) -> bool:
    """Tells whether ``x`` is a DTensor, of which each process holds a part, and imports nothing for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def replicated_beside(x: Any, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns ``tensors``, which every process has whole, as they are, or as DTensors where ``x`` is one."""
    if not is_dtensor(x):
        return tensors
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    return tuple(
        DTensor.from_local(tensor, mesh, everywhere, run_check=False)
        if isinstance(tensor, torch.Tensor) and not is_dtensor(tensor)
        else tensor
        for tensor in tensors
    )


@contextmanager
def unsharded(model: Model) -> Generator[None]:
    """Keeps the whole of all parameters that FSDP (``fully_shard``) has sharded, until the block ends.

    Then they may be used outside of the forward of the module that holds them, and processes need not call as many
    forwards as each other. Other models stay as they are.
    """
    modules = _sharded_modules(model)
    if not modules:
        yield
        return
    states = [module._get_fsdp_state() for module in modules]
    for state in states:
        state._lazy_init()  # The outermost comes first; it takes those inside to itself.
    groups = [group for state in states for group in _parameter_groups(state)]
    kept = [group.post_forward_mesh_info for group in groups]
    held = [group.is_unsharded for group in groups]
    for module in modules:
        module.unshard()
    for group in groups:
        group.post_forward_mesh_info = None  # The forward of a module would shard it again.
    try:
        yield
    finally:
        for group, mesh_info, was_unsharded in zip(groups, kept, held, strict=True):
            group.post_forward_mesh_info = mesh_info
            if not was_unsharded:
                group.reshard()


def _parameter_groups(state: Any) -> list[Any]:
    """Returns the groups of parameters that are gathered together; torch 2.11 has one at most, under its own name."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _sharded_modules(model: Model) -> list[Any]:
    """Returns the modules in a model that ``fully_shard`` was called on, the outermost first."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
