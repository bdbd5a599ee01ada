"""The `cpu` backend: the compiled kernels of csrc/cpu on torch tensors; allocates outputs and passes pointers.

``LED_KERNELS_CPU_ISA`` names the instruction set (default: the best that the processor runs). Threads: as many as
``torch.get_num_threads()``, on torch's OpenMP pool.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from led_kernels.mask import LongformerMask

try:
    from led_kernels import _C
except ImportError as error:
    raise ImportError(
        f"led_kernels._C cannot be imported ({error}); install a C++17 compiler and reinstall led-kernels, or use "
        "backend='torch'."
    ) from error


def banded_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Banded attention -> out like q, lse ``[batch, heads, seqlen]`` (packed ``[heads, total_rows]``)."""
    params = _params(q, k, v, mask, softmax_scale, dropout_p, seed)
    params.window_left, params.window_right = window_left, window_right
    *lead, rows, heads, _ = q.shape
    return _run_forward(_C.cpu_banded_forward, params, q, (*lead, heads, rows))


def global_forward(
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Global attention -> out ``[batch, max_globals, heads, head_dim]``, lse ``[batch, heads, max_globals]``."""
    params = _params(q_global, k_global, v_global, mask, softmax_scale, dropout_p, seed)
    batch, max_globals, heads, _ = q_global.shape
    return _run_forward(_C.cpu_global_forward, params, q_global, (batch, heads, max_globals))


def banded_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LongformerMask,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`banded_forward`."""
    params = _params(q, k, v, mask, softmax_scale, dropout_p, seed)
    params.window_left, params.window_right = window_left, window_right
    return _run_backward(_C.cpu_banded_backward, params, d_out, d_lse, q, k, v, out, lse)


def global_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q_global: Tensor,
    k_global: Tensor,
    v_global: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`global_forward`."""
    params = _params(q_global, k_global, v_global, mask, softmax_scale, dropout_p, seed)
    return _run_backward(_C.cpu_global_backward, params, d_out, d_lse, q_global, k_global, v_global, out, lse)


@functools.cache
def instruction_set() -> str:
    """Name of the instruction set in use.

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


def _run_forward(kernel, params, q: Tensor, lse_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(lse_shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    params.set_out(_rows(out))
    params.set_lse(_lse(lse))
    kernel(params, instruction_set())
    return out, lse


def _run_backward(kernel, params, d_out, d_lse, q, k, v, out, lse) -> tuple[Tensor, Tensor, Tensor]:
    d_out = d_out if d_out.stride(-1) == 1 or d_out.shape[-1] == 1 else d_out.contiguous()
    lse = lse.contiguous()
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    params.set_out(_rows(out))
    params.set_lse(_lse(lse))
    params.set_d_out(_rows(d_out))
    if d_lse is not None:
        d_lse = d_lse.contiguous()
        params.set_d_lse(_lse(d_lse))
    for set_grad, grad in zip((params.set_dq, params.set_dk, params.set_dv), grads, strict=True):
        set_grad(_rows(grad))
    kernel(params, instruction_set())
    return grads


def _params(q, k, v, mask: LongformerMask, softmax_scale: float, dropout_p: float, seed: Tensor | None):
    params = _C.AttentionParams()
    params.dtype = getattr(_C.DType, str(q.dtype).removeprefix("torch."))
    params.batch, params.max_seqlen = mask.batch, mask.max_seqlen
    params.heads, params.head_dim = q.shape[-2:]
    params.softmax_scale = softmax_scale
    params.dropout_p = dropout_p
    params.dropout_seed = 0 if seed is None else int(seed)
    params.num_threads = torch.get_num_threads()
    tensors = (
        mask.seq_start, mask.seq_len, mask.token_kind, mask.padding_before, mask.global_index, mask.num_globals,
    )  # fmt: skip
    batch_stride = 0 if mask.is_packed else mask.max_seqlen
    params.set_mask(*(x.data_ptr() for x in tensors), batch_stride, mask.max_globals, mask.is_packed)
    params.set_q(_rows(q))
    params.set_k(_rows(k))
    params.set_v(_rows(v))
    return params


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides (batch, row, head) of ``[batch, rows, heads, head_dim]`` or ``[rows, heads, head_dim]``."""
    batch_stride = x.stride(0) if x.dim() == 4 else 0
    return x.data_ptr(), batch_stride, x.stride(-3), x.stride(-2)


def _lse(x: Tensor) -> tuple[int, int, int]:
    """Address and strides (batch, head) of ``[batch, heads, rows]`` or ``[heads, total_rows]``."""
    batch_stride = x.stride(0) if x.dim() == 3 else 0
    return x.data_ptr(), batch_stride, x.stride(-2)
