"""These functions pass torch tensors to the kernels of the extension ``led_kernels._C``, which this module imports."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from led_kernels.argument_checks import check_storage
from led_kernels.backends._results import new_gradients, new_results
from led_kernels.call import AttentionCall
from led_kernels.extras import REINSTALL


def build_error(name: str) -> str | None:
    """Tells why setup.py could not build a part of the extension, if it said so in the file ``name``."""
    path = Path(__file__).parents[1] / name
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


try:
    from led_kernels import _C
except ImportError as error:
    raise ImportError(
        f"the extension led_kernels._C is not there ({build_error('_build_error.txt') or error}); install a C++17 "
        f"compiler and {REINSTALL}, or use backend='torch'."
    ) from error


@functools.cache
def element_type(dtype: torch.dtype) -> _C.DType:
    """Returns a torch dtype as the kernels name it."""
    return getattr(_C.DType, str(dtype).removeprefix("torch."))


def attention_params(call: AttentionCall) -> _C.AttentionParams:
    """Returns the parameters of a kernel but for its outputs, seed and place of execution."""
    q, mask = call.q, call.mask
    params = _C.AttentionParams()
    params.dtype = element_type(q.dtype)
    params.batch, params.max_seqlen = mask.batch, mask.max_seqlen
    params.heads, params.head_dim = q.shape[-2:]
    if call.window is not None:
        params.window_left, params.window_right = call.window
    params.softmax_scale = call.softmax_scale
    params.dropout_p = call.dropout_p
    tensors = [memory(x) for x in mask.tensors()]
    params.set_mask(tensors, mask.token_kind.shape[-1], mask.max_globals, mask.is_packed)
    params.set_q(_rows(q))
    params.set_k(_rows(call.k))
    params.set_v(_rows(call.v))
    return params


def run_forward(
    kernel: Callable[[_C.AttentionParams], None],
    params: _C.AttentionParams,
    call: AttentionCall,
    has_gaps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Allocates out and lse, with ``has_gaps`` filled for rows that the kernel leaves, and runs a forward kernel."""
    out, lse = new_results(call, has_gaps)
    params.set_out(_rows(out))
    params.set_lse(_lse(lse))
    kernel(params)
    return out, lse


def run_backward(
    kernel: Callable[[_C.AttentionParams], None],
    params: _C.AttentionParams,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    has_gaps: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates dq, dk and dv, with ``has_gaps`` as zeros, and runs a backward kernel."""
    if d_out.stride(-1) != 1 and d_out.shape[-1] > 1:
        d_out = copied("d_out", d_out)
    lse = lse if lse.is_contiguous() else copied("lse", lse)
    dq, dk, dv = new_gradients(call, has_gaps)
    params.set_out(_rows(out))
    params.set_lse(_lse(lse))
    params.set_d_out(_rows(d_out))
    if d_lse is not None:
        d_lse = d_lse if d_lse.is_contiguous() else copied("d_lse", d_lse)
        params.set_d_lse(_lse(d_lse))
    params.set_dq(_rows(dq))
    params.set_dk(_rows(dk))
    params.set_dv(_rows(dv))
    kernel(params)
    return dq, dk, dv


def memory(x: Tensor) -> tuple[int, int]:
    """Returns the address of the first element, and how many bytes lie from there on.

    They are counted in the storage, which may have been shrunk since, and not by x.nbytes.
    """
    return x.data_ptr(), x.untyped_storage().nbytes() - int(x.storage_offset()) * x.itemsize


def copied(name: str, x: Tensor) -> Tensor:
    """Copies a tensor to a contiguous one, as torch does not, for it does not look at how large the storage is."""
    check_storage(name, x)
    return x.clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """Returns address, strides (batch, row, head) and bytes of ``[(batch,) rows, heads, head_dim]``."""
    # a dimension of size 1 may have any stride, also one that is not aligned
    strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
    address, size = memory(x)
    return address, strides[0] if x.dim() == 4 else 0, strides[-3], strides[-2], size


def _lse(x: Tensor) -> tuple[int, int, int, int]:
    """Returns address, strides (batch, head) and bytes of a contiguous ``[(batch,) heads, rows]``."""
    *lead, heads, rows = x.shape  # not x.stride(): where a size is 1, that may be anything
    address, size = memory(x)
    return address, heads * rows if lead else 0, rows, size
