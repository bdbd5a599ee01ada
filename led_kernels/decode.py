"""What a decoding step is bound by: weights, keys and values that are read from memory once for a few rows.

On the CPU, torch's matrix products and SDPA read them at a half to a fifth of the bandwidth; there the compiled kernels
of ``csrc/cpu/few_rows.h`` serve. Everywhere else, and wherever a gradient may be wanted, these functions are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from led_kernels.dispatch import backend_module, choose_backend
from led_kernels.projection import is_plain_linear, runs_its_own_code

_FEW = 16  # rows, from which on torch is as fast


def few_rows_linear(module: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """``module(x)``; by a kernel when ``module`` is a plain ``nn.Linear`` and ``x`` has at most 16 rows.

    Args:
        module: hooked, quantised and adapted modules are called as they are.
        x: ``[..., in_features]``, in the dtype of the weight.
        gelu: apply ``F.gelu`` to the result.

    Returns:
        ``[..., out_features]``.
    """
    if _serves(x, x.shape[-1]) and is_plain_linear(module) and module.weight.dtype == x.dtype:
        return backend_module("cpu").few_rows_linear(x, module.weight, module.bias, gelu)
    y = module(x)
    return F.gelu(y) if gelu else y


def few_rows_add_norm(residual: Tensor, block: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm(residual + block)``, both ``[..., d_model]``; by one kernel for at most 16 rows, else over ``block``."""
    is_plain = type(norm) is nn.LayerNorm and norm.bias is not None and runs_its_own_code(norm)
    same_dtype = residual.dtype == block.dtype == norm.weight.dtype
    if is_plain and same_dtype and _serves(residual, residual.shape[-1]):
        return backend_module("cpu").few_rows_add_norm(residual, block, norm.weight, norm.bias, norm.eps)
    if block.dtype == residual.dtype:
        block += residual  # in place: neither a Linear nor a dropout keeps its output for the backward
    else:  # autocast: the residual stream keeps the wider dtype
        block = block + residual
    return norm(block)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """``scaled_dot_product_attention(q, k, v, visible)``; by a kernel for at most 16 queries.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k, v: ``[batch, heads, keys, head_dim]``.
        visible: which keys a query sees, ``[batch or 1, 1, queries or 1, keys]``, bool; of another dtype, added to the
            scores by torch. Default: all. A query must see one key at least.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    batch, heads, _, head_dim = q.shape
    is_bool = visible is None or visible.dtype == torch.bool
    if is_bool and head_dim <= 256 and q.dtype == k.dtype and _serves(q, batch * heads * head_dim):
        return backend_module("cpu").decode_attention(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, visible)


def write_rows(cache: Tensor, position: Tensor, rows: Tensor) -> None:
    """``cache.index_copy_(2, position, rows)``; by a kernel for at most 16 rows.

    Args:
        cache: ``[batch, heads, slots, head_dim]``.
        position: int64 ``[n]``, slots that ``rows``, ``[batch, heads, n, head_dim]``, are written to.

    Raises:
        IndexError: for a position that the cache does not have.
    """
    if rows.dtype == cache.dtype and _serves(rows, rows.numel() // rows.shape[2]):
        backend_module("cpu").write_rows(cache, position, rows)
    else:
        cache.index_copy_(2, position, rows)


class CapturedCalls:
    """Kernel calls of one decoding step, recorded once and then made again by one call: a CUDA graph's like on the CPU,
    where a step's hundred calls from Python take a fifth of its time.

    ``result`` is what the function returned. It and every tensor that the calls read are at fixed addresses: replaying
    reads what is there now, and overwrites ``result``.
    """

    def __init__(self, result: Tensor, recording: object, kept: list[Tensor]) -> None:
        self.result = result
        self._recording = recording
        self._kept = kept  # the memory that the calls point to

    @classmethod
    def of(cls, function: Callable[[], Tensor]) -> CapturedCalls | None:
        """Runs ``function``; ``None`` when anything but kernels and views computes in it, which no replay would do."""
        if not _cpu_is_chosen(torch.float32):
            return None
        mode, recording = _KernelsAlone(), backend_module("cpu").Recording()
        try:
            with mode, recording:
                result = function()
        except _OtherOperation:
            return None
        return cls(result, recording, mode.kept)

    def replay(self) -> None:
        self._recording.replay()


class _OtherOperation(Exception):
    pass


class _KernelsAlone(TorchDispatchMode):
    """Lets views and allocations pass, which it keeps, and refuses every other operation of torch."""

    _ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self._ALLOCATIONS:
            tensor = function(*args, **kwargs or {})
            self.kept.append(tensor)
            return tensor
        if not function.is_view:
            raise _OtherOperation(str(function))
        return function(*args, **kwargs or {})


def _serves(x: Tensor, row: int) -> bool:
    """Whether the kernels serve ``x``, whose rows are ``row`` numbers each."""
    return (
        0 < x.numel() <= _FEW * row
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _cpu_is_chosen(x.dtype)
    )


@functools.cache
def _cpu_is_chosen(dtype: torch.dtype) -> bool:
    """Asked once for a process: a step of 20 ms makes 70 calls."""
    return choose_backend(torch.device("cpu"), dtype) == "cpu"
