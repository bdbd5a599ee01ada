"""These functions tell what calling an ``nn.Module`` runs: torch's own code alone, or also hooks and patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

# These are taken at import, so that what a caller puts in their place later is told apart.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm)}
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tells whether calling the module is x Wᵀ + b with its own parameters and nothing else.

    The exact type excludes LoRA, bitsandbytes and parametrizations; the parameters' type excludes quantized
    and sharded tensors; the forward function excludes accelerate's hooks.
    """
    return type(module) is nn.Linear and runs_its_own_code(module)


def runs_its_own_code(module: nn.Module) -> bool:
    """Tells whether calling an ``nn.Linear`` or ``nn.LayerNorm`` runs torch's code alone, on a plain tensor as weight.

    It is False for modules of all other types.
    """
    kind = type(module)
    return (
        kind in _FORWARDS
        and getattr(module.forward, "__func__", None) is _FORWARDS[kind]
        and kind.__call__ is _CALL
        and kind._call_impl is _CALL_IMPL
        and type(module.weight) is nn.Parameter
        and not is_hooked(module)
    )


def calls_only(module: nn.Module, forward: Callable) -> bool:
    """Tells whether calling the module runs ``forward``, a function of its class, and no hook.

    Then what its forward does may be done in another way, by whoever knows it.
    """
    return type(module).forward is forward and "forward" not in vars(module) and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Tells whether hooks run when the module is called, its own or those of every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Tells whether hooks are registered that run at every call of every module."""
    every = torch.nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )
