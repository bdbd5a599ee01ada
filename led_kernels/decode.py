"""What a decoding step is bound by: weights, keys and values that are read from memory once for a few rows.

On the CPU, torch's matrix products and SDPA read them at a half to a fifth of the bandwidth; there the compiled kernels
of ``csrc/cpu/few_rows.h`` serve. Everywhere else, and wherever a gradient may be wanted, these functions are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode

from led_kernels.dispatch import backend_module, choose_backend
from led_kernels.eager import is_plain_on_cpu, is_plain_surroundings
from led_kernels.projection import is_plain_linear, runs_its_own_code

if TYPE_CHECKING:
    from led_kernels._C import Recording

_FEW = 16  # rows, from which on torch is as fast
_MAX_HEAD_DIM = 256


def few_rows_linear(module: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """``module(x)``; by a kernel when ``module`` is a plain ``nn.Linear`` and ``x`` has at most 16 rows.

    Args:
        module: hooked, quantised and adapted modules are called as they are.
        x: ``[..., in_features]``, in the dtype of the weight.
        gelu: apply ``F.gelu`` to the result.

    Returns:
        ``[..., out_features]``.
    """
    if _serves(x, 1) and is_plain_linear(module) and _fits_linear(module, x):
        return backend_module("cpu").few_rows_linear(x, module.weight, module.bias, gelu)
    y = module(x)
    return F.gelu(y) if gelu else y


def few_rows_add_norm(residual: Tensor, block: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm(residual + block)``, both ``[..., d_model]``; by one kernel for at most 16 rows."""
    if _serves(residual, 1) and _fits_norm(norm, residual, block):
        return backend_module("cpu").few_rows_add_norm(residual, block, norm.weight, norm.bias, norm.eps)
    return norm(residual + block)  # not in place: a hook may have kept what a module returned


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
    if _serves(q, 3) and _fits_attention(q, k, v, visible):
        return backend_module("cpu").decode_attention(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, visible)


def write_rows(cache: Tensor, position: Tensor, rows: Tensor) -> None:
    """``cache.index_copy_(2, position, rows)``; by a kernel for at most 16 rows.

    Args:
        cache: ``[batch, heads, slots, head_dim]``.
        position: int64 ``[n]``, slots that ``rows``, ``[batch, heads, n, head_dim]``, are written to.

    Raises:
        IndexError: for a position that the cache does not have.
        RuntimeError: for a cache that torch does not write either: of inference mode outside of it, or expanded.
    """
    if _serves(rows, 3) and _fits_cache(cache, position, rows):
        backend_module("cpu").write_rows(cache, position, rows)
        increment_version(cache)  # for autograd, which may have saved it
        if isinstance(mode := _get_current_dispatch_mode(), _KernelsAlone):
            mode.written.append(cache)
    else:
        cache.index_copy_(2, position, rows.to(cache.dtype))  # under autocast the rows are narrower


class CapturedCalls:
    """Kernel calls of one decoding step, recorded once and then made again by one call: a CUDA graph's like on the CPU,
    where a step's hundred calls from Python take a fifth of its time.

    ``result`` is what the function returned. It and every tensor that the calls read are at fixed addresses: replaying
    reads what is there now, and overwrites ``result``.
    """

    def __init__(
        self, result: Tensor, recording: Recording, kept: list[Tensor], written: list[Tensor]
    ) -> None:
        self.result = result
        self._recording = recording
        self._kept = kept  # the memory that the calls point to
        self._written = written  # of a caller, for autograd to know

    @classmethod
    def of(cls, function: Callable[[], Tensor]) -> CapturedCalls | None:
        """Runs ``function``; ``None`` when anything but kernels and views computes in it, or a mode of the caller's
        looks on, which no replay would do."""
        if not _cpu_is_chosen(torch.float32) or not is_plain_surroundings():
            return None
        recording = backend_module("cpu").Recording()
        mode = _KernelsAlone(recording)
        try:
            with mode, recording:
                result = function()
        except _OtherOperation:
            return None
        finally:
            if _get_current_dispatch_mode() is mode:  # Ctrl-C came while it was entered or left
                _pop_mode()
        return cls(result, recording, mode.kept, [result, *mode.written])

    def replay(self) -> None:
        self._recording.replay()
        increment_version(self._written)


class _OtherOperation(Exception):
    pass


class _KernelsAlone(TorchDispatchMode):
    """Lets views and allocations pass, which it keeps, and refuses every other operation of torch.

    While ``recording`` is the current one and no longer: Ctrl-C can leave a mode in place, whose entry and exit are
    Python, but not a recording, whose are not.
    """

    _ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self.kept: list[Tensor] = []
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self._recording.is_current:
            return function(*args, **kwargs or {})
        if function in self._ALLOCATIONS:
            tensor = function(*args, **kwargs or {})
            self.kept.append(tensor)
            return tensor
        if not function.is_view:
            raise _OtherOperation(str(function))
        return function(*args, **kwargs or {})


def _serves(x: Tensor, dims: int) -> bool:
    """Whether the kernels serve tensors like ``x``, of ``dims`` dimensions at least, here and now."""
    return (
        not torch.is_grad_enabled()
        and is_plain_surroundings(under=_KernelsAlone)
        and is_plain_on_cpu(x)
        and x.dim() >= dims
        and not torch.is_autocast_enabled("cpu")
        and _cpu_is_chosen(x.dtype)
    )


def _fits_linear(module: nn.Linear, x: Tensor) -> bool:
    weight, bias = module.weight, module.bias
    features = x.shape[-1]
    return (
        _alike(x, weight, bias)
        and weight.dim() == 2
        and weight.shape[1] == features
        and (bias is None or bias.shape == weight.shape[:1])
        and 0 < x.numel() <= _FEW * features
    )


def _fits_norm(norm: nn.Module, residual: Tensor, block: Tensor) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and runs_its_own_code(norm)
        and norm.bias is not None
        and _alike(residual, block, norm.weight, norm.bias)
        and residual.shape == block.shape
        and residual.shape[-1:] == norm.weight.shape == norm.bias.shape == norm.normalized_shape
        and 0 < residual.numel() <= _FEW * residual.shape[-1]
    )


def _fits_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
    if q.dim() != 4 or k.dim() != 4 or not _alike(q, k, v):
        return False
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    return (
        k.shape == v.shape == (batch, heads, keys, head_dim)
        and keys > 0
        and 1 <= head_dim <= _MAX_HEAD_DIM
        and 0 < queries <= _FEW
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
    if cache.dim() != 4 or rows.dim() != 4 or not _alike(rows, cache):
        return False
    batch, heads, n, head_dim = rows.shape
    return (
        cache.shape == (batch, heads, cache.shape[2], head_dim)
        and cache.stride(-1) == 1
        and 0 < n <= _FEW
        and rows.numel() > 0
        and position.shape == (n,)
        and position.dtype == torch.int64
        and is_plain_on_cpu(position)
        and _may_be_written(cache, rows)
    )


def _may_be_written(cache: Tensor, rows: Tensor) -> bool:
    """Whether torch would write ``rows`` to it in place, too."""
    return (
        (torch.is_inference_mode_enabled() or not cache.is_inference())
        and 0 not in cache.stride()
        and cache.untyped_storage()._cdata != rows.untyped_storage()._cdata  # which might overlap
    )


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Plain tensors on the CPU, of one dtype."""
    return all(other is None or (other.dtype == x.dtype and is_plain_on_cpu(other)) for other in others)


@functools.cache
def _cpu_is_chosen(dtype: torch.dtype) -> bool:
    """Asked once for a process: a step of 20 ms makes 70 calls."""
    return choose_backend(torch.device("cpu"), dtype) == "cpu"
