"""The `cpu` backend: the compiled kernels of csrc/cpu on torch tensors; allocates outputs and passes pointers.

``LED_KERNELS_CPU_ISA`` names the instruction set (default: the best that the processor runs). Threads: as many as
``torch.get_num_threads()``, on torch's OpenMP pool.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from led_kernels.backends._extension import (
    _C,
    attention_params,
    banded_lse_shape,
    global_lse_shape,
    run_backward,
    run_forward,
)
from led_kernels.mask import LongformerMask


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
    return run_forward(_kernel(_C.cpu_banded_forward), params, q, banded_lse_shape(q))


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
    return run_forward(_kernel(_C.cpu_global_forward), params, q_global, global_lse_shape(q_global))


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
    return run_backward(_kernel(_C.cpu_banded_backward), params, d_out, d_lse, q, k, v, out, lse)


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
    kernel = _kernel(_C.cpu_global_backward)
    return run_backward(kernel, params, d_out, d_lse, q_global, k_global, v_global, out, lse)


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


def _kernel(function: Callable) -> Callable[[_C.AttentionParams], None]:
    return lambda params: function(params, instruction_set())


def _params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> _C.AttentionParams:
    params = attention_params(q, k, v, mask, softmax_scale, dropout_p)
    params.dropout_seed = 0 if seed is None else int(seed)
    params.num_threads = torch.get_num_threads()
    return params
