"""These functions compute the matrix-vector products of decoding: few rows in linear layers, attention and caches.

A decoding step is bound by reading weights, keys and values from memory, once for a few rows. On the CPU, torch's
matrix products and SDPA reach a half to a fifth of the memory's bandwidth, and the compiled kernels of
``csrc/cpu/decode.h`` run instead. On other devices, and wherever a gradient may be wanted, torch's own operations run.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.capture import CaptureMode, mark_written
from led_kernels.dispatch import backend_module, choose_backend
from led_kernels.eager import is_plain_on_cpu, is_plain_surroundings
from led_kernels.modules import is_plain_linear, runs_its_own_code

_MAX_ROWS = 16  # With more rows torch is as fast.
_MAX_HEAD_DIM = 256


def few_rows_linear(module: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """Computes ``module(x)``, by a kernel when ``module`` is a plain ``nn.Linear`` and ``x`` has at most 16 rows.

    Args:
        module: any module; hooked, quantized and adapted ones are called as they are.
        x: ``[..., in_features]``, in the dtype of the weight.
        gelu: apply ``F.gelu`` to the result.

    Returns:
        ``[..., out_features]``.
    """
    if _kernels_serve(x, 1) and is_plain_linear(module) and _fits_linear(module, x):
        return backend_module("cpu").few_rows_linear(x, module.weight, module.bias, gelu)
    y = module(x)
    return F.gelu(y) if gelu else y


def few_rows_add_norm(residual: Tensor, block: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Computes ``norm(residual + block)``, by one kernel for at most 16 rows.

    Args:
        residual, block: ``[..., d_model]``, the input of a block and its output.
        norm: the layer norm that follows; any other module is called on the sum.

    Returns:
        ``[..., d_model]``.
    """
    if _kernels_serve(residual, 1) and _fits_norm(norm, residual, block):
        return backend_module("cpu").few_rows_add_norm(residual, block, norm.weight, norm.bias, norm.eps)
    return norm(residual + block)  # The sum is not in place, as a hook may have kept what a module returned.


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Computes ``scaled_dot_product_attention(q, k, v, visible)``, by a kernel for at most 16 queries.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k, v: ``[batch, heads, keys, head_dim]``.
        visible: bool ``[batch or 1, 1, queries or 1, keys]``, true where a query sees a key; each must see one at
            least. Numbers are added to the scores, by torch. By default every query sees every key.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    if _kernels_serve(q, 3) and _fits_attention(q, k, v, visible):
        return backend_module("cpu").decode_attention(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, visible)


def write_rows(cache: Tensor, position: Tensor, rows: Tensor) -> None:
    """Writes rows into a cache of keys or values, as ``cache.index_copy_(2, position, rows)`` does.

    A kernel writes at most 16 rows; torch writes more.

    Args:
        cache: ``[batch, heads, capacity, head_dim]``.
        position: int64 ``[n]``, where in the cache the rows belong.
        rows: ``[batch, heads, n, head_dim]``.

    Raises:
        IndexError: for a position that the cache does not have.
        RuntimeError: for a cache that torch does not write either: one made in inference mode, outside of it, and one
            that was expanded.
    """
    if _kernels_serve(rows, 3) and _fits_cache(cache, position, rows):
        backend_module("cpu").write_rows(cache, position, rows)
        mark_written(cache)
    else:
        cache.index_copy_(2, position, rows.to(cache.dtype))  # Under autocast the rows are narrower.


def _kernels_serve(x: Tensor, dims: int) -> bool:
    """Tells whether the kernels serve tensors like ``x`` at this call; they need ``dims`` dimensions at least."""
    return (
        not torch.is_grad_enabled()
        and is_plain_surroundings(under=CaptureMode)
        and is_plain_on_cpu(x)
        and x.dim() >= dims
        and not torch.is_autocast_enabled("cpu")
        and _cpu_backend_serves(x.dtype)
    )


def _fits_linear(module: nn.Linear, x: Tensor) -> bool:
    """Tells whether the kernel takes these tensors, where torch would broadcast, convert or refuse others."""
    weight, bias = module.weight, module.bias
    features = x.shape[-1]
    return (
        _are_alike(x, weight, bias)
        and weight.dim() == 2
        and weight.shape[1] == features
        and (bias is None or bias.shape == weight.shape[:1])
        and 0 < x.numel() <= _MAX_ROWS * features
    )


def _fits_norm(norm: nn.Module, residual: Tensor, block: Tensor) -> bool:
    """Tells whether the kernel takes the norm and the two tensors."""
    return (
        type(norm) is nn.LayerNorm
        and runs_its_own_code(norm)
        and norm.bias is not None
        and _are_alike(residual, block, norm.weight, norm.bias)
        and residual.shape == block.shape
        and residual.shape[-1:] == norm.weight.shape == norm.bias.shape == norm.normalized_shape
        and 0 < residual.numel() <= _MAX_ROWS * residual.shape[-1]
    )


def _fits_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
    """Tells whether the kernel takes these tensors."""
    if q.dim() != 4 or k.dim() != 4 or not _are_alike(q, k, v):
        return False
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    return (
        k.shape == v.shape == (batch, heads, keys, head_dim)
        and keys > 0
        and 1 <= head_dim <= _MAX_HEAD_DIM
        and 0 < queries <= _MAX_ROWS
        and q.numel() > 0
        and (
            visible is None
            or (
                visible.dtype == torch.bool
                and is_plain_on_cpu(visible)
                and visible.dim() == 4
                and visible.shape[0] in (1, batch)
                and visible.shape[1] == 1
                and visible.shape[2] in (1, queries)
                and visible.shape[3] == keys
            )
        )
    )


def _fits_cache(cache: Tensor, position: Tensor, rows: Tensor) -> bool:
    """Tells whether the kernel may write the rows into the cache."""
    if cache.dim() != 4 or rows.dim() != 4 or not _are_alike(rows, cache):
        return False
    batch, heads, n, head_dim = rows.shape
    return (
        cache.shape == (batch, heads, cache.shape[2], head_dim)
        and cache.stride(-1) == 1
        and 0 < n <= _MAX_ROWS
        and rows.numel() > 0
        and position.shape == (n,)
        and position.dtype == torch.int64
        and is_plain_on_cpu(position)
        and _may_be_written(cache, rows)
    )


def _may_be_written(cache: Tensor, rows: Tensor) -> bool:
    """Tells whether torch, too, would write ``rows`` into ``cache`` in place."""
    return (
        (torch.is_inference_mode_enabled() or not cache.is_inference())
        and 0 not in cache.stride()
        and cache.untyped_storage()._cdata != rows.untyped_storage()._cdata  # views of one could overlap
    )


def _are_alike(x: Tensor, *others: Tensor | None) -> bool:
    """Tells whether all of these are plain tensors on the CPU, in the dtype of ``x``."""
    return all(other is None or (other.dtype == x.dtype and is_plain_on_cpu(other)) for other in others)


@functools.cache
def _cpu_backend_serves(dtype: torch.dtype) -> bool:
    """Tells whether the compiled CPU kernels are what a call in ``dtype`` on the CPU gets.

    It is asked once for a process, as a decoding step of 20 ms makes 70 calls.
    """
    return choose_backend(torch.device("cpu"), dtype) == "cpu"
