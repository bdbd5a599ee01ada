"""An autograd function that computes its gradients by other means than autograd refuses to be differentiated twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order_only(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorates an autograd function's backward so that a second derivative through its gradients raises.

    torch's ``once_differentiable`` lets one pass whose first gradient was constant, as a term that is missing.
    """

    @functools.wraps(backward)
    def called(ctx: Any, *grad_outputs: Any) -> tuple:
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():
            return gradients
        return _Constant.apply(torch.zeros((), requires_grad=True), *gradients)

    return called


class _Constant(torch.autograd.Function):
    """Returns gradients as they are, with a history that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(x if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError(
            "double backward through a layer or a loss of led_kernels is not supported; use transformers' own model "
            "where second derivatives are needed."
        )
