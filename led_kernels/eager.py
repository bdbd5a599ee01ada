"""These functions tell tensors that hold numbers from those that stand for what a program will see later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Tells whether the tensors are plain, hold numbers, and an operation on them runs at once and on them alone.

    It is False while a program is compiled, traced or exported, under function transforms, forward-mode differentiation
    and dispatch modes, and for tensors on ``meta``, fake ones and other subclasses.
    """
    return _runs_now() and all(type(x) in _PLAIN_TYPES and not x.is_meta for x in tensors)


def is_plain_surroundings(under: type | None = None) -> bool:
    """Tells whether no mode or transform takes part in an operation, so that a kernel may run in its place.

    It is False where :func:`is_eager` is False for every tensor, and under function modes other than that of
    ``torch.device``, which see operations that a kernel would hide from them. Dispatch modes of the type ``under`` do
    not count.
    """
    return _runs_now(under) and (
        torch._C._len_torch_function_stack() == 0
        or all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
    )


def is_transformed() -> bool:
    """Tells whether a function transform of torch.func or forward-mode differentiation is at work.

    It is False while a program is compiled.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_plain_on_cpu(x: Tensor) -> bool:
    """Tells whether the numbers of ``x`` lie in memory on the CPU as they are: not sparse, not negated when read."""
    return (
        type(x) in _PLAIN_TYPES
        and x.is_cpu
        and x.layout is torch.strided
        and not (x.is_nested or x.is_neg() or x._is_zerotensor())
    )


def _runs_now(under: type | None = None) -> bool:
    """Tells whether operations run at once, under no transform and no dispatch mode but those of type ``under``."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or is_transformed():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 or all(
        type(mode) is under for mode in _get_current_dispatch_mode_stack()
    )


def never_compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns a function that ``torch.compile`` leaves out of its graphs.

    ``torch.compiler.disable`` does so too, but imports the compiler when it is called, for two seconds.
    """

    @functools.wraps(function)
    def called(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return called
