"""The custom operators are defined here: schemas, fake functions and autograd.

torch.library takes flat tensors, numbers and the backend's name, so an :class:`AttentionCall` is taken apart here and
put together again inside of an operator. Public functions have validated their arguments for people; here, where a
traced graph arrives too, shapes are compared once more, so that no backend makes a pointer to less than it reads.

``banded_forward`` and ``global_forward`` return ``(out, lse)``; their backward operators recompute the probabilities
from ``lse`` and so save only q, k, v, out and lse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from led_kernels.argument_checks import check_storage
from led_kernels.call import AttentionCall, lse_dtype
from led_kernels.call_checks import check_call, check_gradients
from led_kernels.dispatch import backend_module
from led_kernels.eager import is_transformed
from led_kernels.mask import LongformerMask
from led_kernels.mask_tensors import MaskTensors
from led_kernels.processes import is_dtensor, replicated_beside

_NO_FORWARD_MODE = (
    "forward-mode differentiation through led_kernels attention is not supported; use reverse mode: torch.func.grad, "
    "vjp or jacrev."
)
_NO_DOUBLE_BACKWARD = (
    "double backward through led_kernels attention is not supported; use backend-free dense attention where second "
    "derivatives are needed."
)

# An operator's arguments: `{}` stands for what public functions append to the names of global attention's tensors.
_RESULTS = "Tensor out, Tensor lse"
_GRADIENTS = "Tensor d_out, Tensor? d_lse"
_INPUTS = "Tensor q{0}, Tensor k{0}, Tensor v{0}"
_MASK = ", ".join(f"Tensor {name}" for name in MaskTensors._fields)
_WINDOW = "SymInt window_left, SymInt window_right"
_SOFTMAX = "float softmax_scale, float dropout_p, str backend"
_NUM_MASK_TENSORS = len(MaskTensors._fields)


def attend(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """Runs a call on the named backend -> out, lse, both with gradients."""
    op = _global if call.is_global else _banded
    arguments = _flatten(call)
    if is_dtensor(call.q):
        from led_kernels import sharding  # which imports what DTensors need

        for operator in (banded_forward, banded_backward, global_forward, global_backward):
            sharding.register(operator._opoverload)
        sharding.check_dropout(call.q, call.dropout_p)
        q, k, v, *others = arguments
        arguments = (q, k, v, *replicated_beside(q, tuple(others)))
    return op(*arguments, backend)


def _flatten(call: AttentionCall) -> tuple:
    """Returns all of a call, in the order of the operators' schemas."""
    window = () if call.window is None else call.window
    return (
        call.q, call.k, call.v, *call.mask.tensors(), call.seed, call.mask.max_seqlen, *window,
        call.softmax_scale, call.dropout_p,
    )  # fmt: skip


def _unflatten(q: Tensor, k: Tensor, v: Tensor, *rest) -> AttentionCall:
    """Returns the call that :func:`_flatten` took apart."""
    seed, max_seqlen, *window, softmax_scale, dropout_p = rest[_NUM_MASK_TENSORS:]
    mask = LongformerMask.from_tensors(MaskTensors(*rest[:_NUM_MASK_TENSORS]), max_seqlen)
    return AttentionCall(q, k, v, mask, tuple(window) or None, softmax_scale, dropout_p, seed)


def _forward(*args) -> tuple[Tensor, Tensor]:
    *flat, backend = args
    call = _unflatten(*flat)
    check_call(call)
    return backend_module(backend).forward(call)


def _backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    *flat, backend = rest
    call = _unflatten(q, k, v, *flat)
    check_call(call)
    check_gradients(call, out, lse, d_out, d_lse)
    return backend_module(backend).backward(call, out, lse, d_out, d_lse)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor]:
    # padded [batch, seqlen, heads, head_dim] -> [batch, heads, seqlen]; packed [rows, heads, head_dim] -> [heads, rows]
    *lead, rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*lead, heads, rows), dtype=lse_dtype(q.dtype))


def _fake_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _define(
    name: str, arguments: list[str], num_results: int, function: Callable, fake: Callable
) -> CustomOpDef:
    """Registers an operator whose body runs without autocast and on memory that is there.

    api.py has cast the inputs; from there on autocast must not round what a backend computes in torch operations. The
    compiled backends compare the memory of each tensor with what they read; torch and Triton do not.
    """
    schema = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * num_results)})"
    names = [argument.split()[-1] for argument in ", ".join(arguments).split(", ")]

    def run(*args):
        if args[-1] not in ("cpu", "cuda"):
            for name, x in zip(names, args, strict=True):
                if isinstance(x, Tensor):
                    check_storage(name, x)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    op = torch.library.custom_op(f"led_kernels::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _save(ctx, inputs, output):
    q, k, v, *rest = inputs
    num_tensors = _NUM_MASK_TENSORS + 1  # and the seed
    tensors, ctx.settings = rest[:num_tensors], rest[num_tensors:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _backward_through(backward_op: Callable) -> Callable[..., tuple]:
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        no_grads = (None,) * (len(tensors) + len(ctx.settings))
        if d_out is None and d_lse is None:
            return None, None, None, *no_grads
        if d_out is None:
            d_out = torch.zeros_like(out)
        return *backward_op(d_out, d_lse, q, k, v, out, lse, *tensors, *ctx.settings), *no_grads

    return backward


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(_NO_DOUBLE_BACKWARD)


def _refuse_forward_mode(ctx, *tangents):
    raise NotImplementedError(_NO_FORWARD_MODE)


def _transformable(forward_op: Callable, backward_op: Callable) -> Callable:
    """Gives ``forward_op`` its gradients also under torch.func, which takes none from an operator's registration, and
    under forward-mode differentiation, which takes such an operator for a constant."""

    class AttentionBackward(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: backward_op(*args))
        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(_refuse_double_backward)
        jvp = staticmethod(_refuse_forward_mode)

    class Attention(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: forward_op(*args))
        setup_context = staticmethod(_save)
        backward = staticmethod(_backward_through(AttentionBackward.apply))
        jvp = staticmethod(_refuse_forward_mode)

    def call(*args):
        return (Attention.apply if is_transformed() else forward_op)(*args)

    return call


def _refuse_tangents(op: CustomOpDef) -> None:
    """Makes an operator raise for tensors with tangents, which a registration by torch.library drops.

    Here and not in :func:`_transformable`, for a compiled program calls the operator alone. Kernels for the keys of
    devices go before the one for all, which is the registration's.
    """
    reverse_mode = make_autograd_impl(op._opoverload, op)

    def run(keyset, *args):
        if forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        ):
            raise NotImplementedError(_NO_FORWARD_MODE)
        return reverse_mode(keyset, *args)

    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta"):
        op._lib.impl(op._name, run, key, with_keyset=True)


def _define_attention(name: str, suffix: str, *window: str) -> tuple[CustomOpDef, CustomOpDef]:
    """Registers the forward and the backward operator of banded or of global attention."""
    inputs, settings = _INPUTS.format(suffix), [_MASK, "Tensor? seed, SymInt max_seqlen", *window, _SOFTMAX]
    forward = _define(f"{name}_forward", [inputs, *settings], 2, _forward, _fake_forward)
    backward = _define(
        f"{name}_backward", [_GRADIENTS, inputs, _RESULTS, *settings], 3, _backward, _fake_backward
    )
    forward.register_autograd(_backward_through(backward), setup_context=_save)
    backward.register_autograd(_refuse_double_backward)
    for op in (forward, backward):
        _refuse_tangents(op)
    return forward, backward


banded_forward, banded_backward = _define_attention("banded", "", _WINDOW)
global_forward, global_backward = _define_attention("global", "_global")
_banded = _transformable(banded_forward, banded_backward)
_global = _transformable(global_forward, global_backward)
