"""The `cpu` backend runs the compiled kernels of csrc/cpu on torch tensors: it allocates outputs and passes pointers.

``LED_KERNELS_CPU_ISA`` names the instruction set (default: the best that the processor runs). Threads: as many as
``torch.get_num_threads()``, on torch's OpenMP pool.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from led_kernels.backends._extension import (
    _C,
    attention_params,
    copied,
    element_type,
    memory,
    run_backward,
    run_forward,
)
from led_kernels.call import AttentionCall


def _copies_misaligned(function: Callable) -> Callable:
    """Calls ``function`` again with copies of those tensors whose elements do not lie at multiples of their size."""

    @functools.wraps(function)
    def run(*args):
        try:
            return function(*args)
        except _C.Misaligned:
            return function(*map(_aligned, args))

    return run


def _aligned(x: Any) -> Any:
    if isinstance(x, AttentionCall):
        return replace(x, q=_aligned(x.q), k=_aligned(x.k), v=_aligned(x.v))
    if isinstance(x, Tensor) and x.data_ptr() % x.itemsize != 0:
        return copied("a misaligned tensor", x)
    return x


@_copies_misaligned
def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes attention by the compiled kernels -> out, lse."""
    kernel = _C.cpu_global_forward if call.is_global else _C.cpu_banded_forward
    return run_forward(_on_this_processor(kernel), _params(call), call)


@_copies_misaligned
def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of :func:`forward` -> dq, dk, dv."""
    kernel = _C.cpu_global_backward if call.is_global else _C.cpu_banded_backward
    return run_backward(_on_this_processor(kernel), _params(call), call, out, lse, d_out, d_lse)


Recording = _C.Recording


def write_rows(cache: Tensor, position: Tensor, rows: Tensor) -> None:
    """Writes ``rows`` ``[batch, heads, n, head_dim]`` into ``cache`` ``[batch, heads, capacity, head_dim]``.

    ``position``: int64 ``[n]``, where in the cache the rows belong.
    """
    batch, heads, n, head_dim = rows.shape
    _check("cache", cache, (batch, heads, cache.shape[2], head_dim), rows)
    _check("position", position, (n,), rows, torch.int64)
    rows = _contiguous_rows("rows", rows)
    if cache.stride(-1) != 1 and head_dim > 1:
        raise ValueError("cache has a non-contiguous last dimension; allocate it contiguous.")
    position = _contiguous("position", position)
    _C.cpu_write_rows(
        element_type(cache.dtype),
        rows.shape,
        cache.shape[2],
        memory(position),
        _heads(rows),
        _heads(cache),
        instruction_set(),
    )


@_copies_misaligned
def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Multiplies x ``[..., in_features]`` by weight ``[out_features, in_features]`` -> ``[..., out_features]``."""
    out_features, in_features = weight.shape
    _check("x", x, (*x.shape[:-1], in_features), weight)
    if bias is not None:
        _check("bias", bias, (out_features,), weight)
        bias = bias if bias.is_contiguous() else copied("bias", bias)
    x = x if x.is_contiguous() else copied("x", x)
    if weight.stride(1) != 1 or weight.stride(0) < in_features:
        weight = _contiguous("weight", weight)
    y = x.new_empty((*x.shape[:-1], out_features))
    _C.cpu_few_rows_linear(
        element_type(x.dtype),
        (x.shape[:-1].numel(), in_features, out_features),
        memory(x),
        memory(weight),
        weight.stride(0),
        (0, 0) if bias is None else memory(bias),
        memory(y),
        gelu,
        torch.get_num_threads(),
        instruction_set(),
    )
    return y


@_copies_misaligned
def few_rows_add_norm(residual: Tensor, block: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Computes the layer norm of ``residual + block``, both ``[..., features]`` -> like them."""
    for name, x, shape in (
        ("block", block, residual.shape),
        ("weight", weight, residual.shape[-1:]),
        ("bias", bias, residual.shape[-1:]),
    ):
        _check(name, x, shape, residual)
    residual, block = _contiguous("residual", residual), _contiguous("block", block)
    weight, bias = _contiguous("weight", weight), _contiguous("bias", bias)
    y = torch.empty_like(residual)
    _C.cpu_few_rows_add_norm(
        element_type(residual.dtype),
        residual.shape[:-1].numel(),
        weight.shape[0],
        memory(residual),
        memory(block),
        memory(weight),
        memory(bias),
        memory(y),
        eps,
        instruction_set(),
    )
    return y


@_copies_misaligned
def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Attends ``q`` ``[batch, heads, queries, head_dim]`` to ``k, v`` ``[batch, heads, keys, head_dim]`` -> like ``q``,
    as a view of ``[batch, queries, heads, head_dim]``.

    ``visible``: bool ``[batch or 1, 1, queries or 1, keys]``.
    """
    batch, heads, queries, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        _check(name, x, (batch, heads, k.shape[2], head_dim), q)
    if visible is not None:
        masks, rows = (
            visible.shape[i] if visible.shape[i] == 1 else n for i, n in ((0, batch), (2, queries))
        )
        _check("visible", visible, (masks, 1, rows, k.shape[2]), q, torch.bool)
    out = q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    params = _C.DecodeParams()
    params.dtype = element_type(q.dtype)
    params.batch, params.heads, params.queries, params.head_dim = batch, heads, queries, head_dim
    params.max_seqlen = k.shape[2]
    params.softmax_scale = head_dim**-0.5
    params.num_threads = torch.get_num_threads()
    q, k, v = _contiguous_rows("q", q), _contiguous_rows("k", k), _contiguous_rows("v", v)
    params.set_q(_heads(q))
    params.set_k(_heads(k))
    params.set_v(_heads(v))
    params.set_out(_heads(out))
    if visible is not None:
        visible = _contiguous("visible", visible)
        masks, _, rows, keys = visible.shape
        params.set_visible(
            memory(visible),
            rows * keys if masks > 1 else 0,
            keys if rows > 1 else 0,
        )
    _C.cpu_decode_attention(params, instruction_set())
    return out


def _check(
    name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError for a tensor whose address the kernels must not get."""
    dtype = like.dtype if dtype is None else dtype
    if x.shape != shape or x.dtype != dtype or x.device.type != "cpu" or like.device.type != "cpu":
        raise ValueError(
            f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}; give {tuple(shape)} of {dtype} on the CPU."
        )


def _contiguous(name: str, x: Tensor) -> Tensor:
    return x if x.is_contiguous() else copied(name, x)


def _contiguous_rows(name: str, x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else copied(name, x)


def _heads(x: Tensor) -> tuple[int, int, int, int, int]:
    """Returns address, strides (batch, row, head) and bytes of ``[batch, heads, rows, head_dim]``."""
    batch_stride, head_stride, row_stride, _ = x.stride()
    address, size = memory(x)
    return address, batch_stride, row_stride, head_stride, size


@functools.cache
def instruction_set() -> str:
    """Returns the name of the instruction set in use.

    Raises:
        ValueError: when ``LED_KERNELS_CPU_ISA`` names one that this build or processor lacks.
    """
    available = _C.cpu_isas()
    named = os.environ.get("LED_KERNELS_CPU_ISA") or available[0]
    if named not in available:
        raise ValueError(
            f"LED_KERNELS_CPU_ISA is {named!r}; this build on this processor has {', '.join(available)}."
        )
    return named


def _on_this_processor(kernel: Callable) -> Callable[[_C.AttentionParams], None]:
    return lambda params: kernel(params, instruction_set())


def _params(call: AttentionCall) -> _C.AttentionParams:
    params = attention_params(call)
    params.dropout_seed = 0 if call.seed is None else int(call.seed)
    params.num_threads = torch.get_num_threads()
    return params
