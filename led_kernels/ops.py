"""The custom ops: schemas, fake functions and autograd. Flat tensors, ints and a backend name.

Public functions have validated their arguments for people; here, where a traced graph arrives too, shapes are compared
once more, so that no backend makes a pointer to less than it reads.

``banded_forward`` and ``global_forward`` return ``(out, lse)``; their backward ops recompute the probabilities from
``lse`` and so save only q, k, v, out and lse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from led_kernels.argument_checks import check_storage
from led_kernels.call_checks import (
    check_lse,
    check_rows,
    check_seed,
    check_slots,
    check_window,
    lse_dtype,
)
from led_kernels.dispatch import backend_module
from led_kernels.eager import is_transformed
from led_kernels.mask import LongformerMask

_NO_FORWARD_MODE = (
    "forward-mode differentiation through led_kernels attention is not supported; use reverse mode: torch.func.grad, "
    "vjp or jacrev."
)
_NO_DOUBLE_BACKWARD = (
    "double backward through led_kernels attention is not supported; use backend-free dense attention where second "
    "derivatives are needed."
)


def _operator(function: Callable) -> Callable:
    """``function`` as the body of an operator, without autocast and on memory that is there.

    api.py has cast the inputs; from there on autocast must not round what a backend computes in torch operations. The
    compiled backends compare the memory of each tensor with what they read; torch and Triton do not.
    """
    names = tuple(signature(function).parameters)

    @wraps(function)
    def run(*args):
        if args[-1] not in ("cpu", "cuda"):
            for name, x in zip(names, args, strict=True):
                if isinstance(x, Tensor):
                    check_storage(name, x)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return run


@torch.library.custom_op("led_kernels::banded_forward", mutates_args=())
@_operator
def banded_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor,
    seq_len: Tensor,
    token_kind: Tensor,
    padding_before: Tensor,
    global_index: Tensor,
    num_globals: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = _mask(seq_start, seq_len, token_kind, padding_before, global_index, num_globals, max_seqlen)
    check_rows(mask, {"q": q, "k": k, "v": v})
    check_window(mask, window_left, window_right)
    check_seed(seed, dropout_p, q)
    return backend_module(backend).banded_forward(
        q, k, v, mask, window_left, window_right, softmax_scale, dropout_p, seed
    )


@torch.library.custom_op("led_kernels::banded_backward", mutates_args=())
@_operator
def banded_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_start: Tensor,
    seq_len: Tensor,
    token_kind: Tensor,
    padding_before: Tensor,
    global_index: Tensor,
    num_globals: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(seq_start, seq_len, token_kind, padding_before, global_index, num_globals, max_seqlen)
    check_rows(mask, {"q": q, "k": k, "v": v, "d_out": d_out, "out": out})
    check_window(mask, window_left, window_right)
    check_lse(q, {"lse": lse, "d_lse": d_lse})
    check_seed(seed, dropout_p, q)
    return backend_module(backend).banded_backward(
        d_out, d_lse, q, k, v, out, lse, mask, window_left, window_right, softmax_scale, dropout_p, seed
    )


@torch.library.custom_op("led_kernels::global_forward", mutates_args=())
@_operator
def global_forward(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    seq_start: Tensor,
    seq_len: Tensor,
    token_kind: Tensor,
    padding_before: Tensor,
    global_index: Tensor,
    num_globals: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = _mask(seq_start, seq_len, token_kind, padding_before, global_index, num_globals, max_seqlen)
    check_rows(mask, {"k_global": k_global, "v_global": v_global})
    check_slots(mask, k_global, {"q_global": q_global})
    check_seed(seed, dropout_p, q_global)
    return backend_module(backend).global_forward(
        q_global, k_global, v_global, mask, softmax_scale, dropout_p, seed
    )


@torch.library.custom_op("led_kernels::global_backward", mutates_args=())
@_operator
def global_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_start: Tensor,
    seq_len: Tensor,
    token_kind: Tensor,
    padding_before: Tensor,
    global_index: Tensor,
    num_globals: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(seq_start, seq_len, token_kind, padding_before, global_index, num_globals, max_seqlen)
    check_rows(mask, {"k_global": k_global, "v_global": v_global})
    check_slots(mask, k_global, {"q_global": q_global, "d_out": d_out, "out": out})
    check_lse(q_global, {"lse": lse, "d_lse": d_lse})
    check_seed(seed, dropout_p, q_global)
    return backend_module(backend).global_backward(
        d_out, d_lse, q_global, k_global, v_global, out, lse, mask, softmax_scale, dropout_p, seed
    )


def _mask(*fields: Tensor | int) -> LongformerMask:
    """The mask of all its fields, which an operator takes one by one."""
    return LongformerMask(*fields, are_values_checked=True)


@banded_forward.register_fake
def _(q, k, v, *args):
    # padded [batch, seqlen, heads, head_dim] -> [batch, heads, seqlen]; packed [rows, heads, head_dim] -> [heads, rows]
    *lead, rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*lead, heads, rows), dtype=lse_dtype(q.dtype))


@global_forward.register_fake
def _(q_global, k_global, v_global, *args):
    batch, max_globals, heads, _ = q_global.shape
    lse = q_global.new_empty((batch, heads, max_globals), dtype=lse_dtype(q_global.dtype))
    return q_global.new_empty(q_global.shape), lse


def _fake_backward(d_out, d_lse, q, k, v, *args):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *rest = inputs
    tensors, ctx.settings = (
        rest[:7],
        rest[7:],
    )  # the six of the mask and the seed; sizes, scale, dropout, backend
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _backward_through(backward_op):
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
    """``forward_op`` with its gradients, also under torch.func, which takes none from an operator's registration, and
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


for _forward, _backward in ((banded_forward, banded_backward), (global_forward, global_backward)):
    _forward.register_autograd(_backward_through(_backward), setup_context=_save)
    _backward.register_fake(_fake_backward)
    _backward.register_autograd(_refuse_double_backward)
    for _op in (_forward, _backward):
        _refuse_tangents(_op)

banded = _transformable(banded_forward, banded_backward)
global_ = _transformable(global_forward, global_backward)
