"""Whether tensors may be looked at and pointed to, or only stand for others that a program will see later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_eager(*tensors: Tensor, under: type | None = None) -> bool:
    """Whether the tensors are plain ones that hold numbers, and what is done to them is done now and to them alone.

    False while a program is compiled, traced or exported, under function transforms, forward-mode differentiation and
    dispatch modes other than ``under``, and for tensors on ``meta``, fake ones and other subclasses.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    mode = _get_current_dispatch_mode()
    is_allowed = mode is None or type(mode) is under
    return is_allowed and all(type(x) in (Tensor, nn.Parameter) and not x.is_meta for x in tensors)


def is_transformed() -> bool:
    """Whether a function transform of torch.func or forward-mode differentiation is at work; False while a program
    is compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
