"""The `cuda` backend: the compiled kernels of csrc/cuda on torch tensors, for NVIDIA GPUs from Turing on.

Allocates outputs and workspaces, passes pointers, and puts the kernels on torch's current stream. Nothing waits for
the device or depends on values that lie there, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from led_kernels.backends._extension import (
    _C,
    attention_params,
    banded_lse_shape,
    build_error,
    global_lse_shape,
    memory,
    run_backward,
    run_forward,
)
from led_kernels.backends._gpu import check_grid, positive_scale
from led_kernels.extras import REINSTALL
from led_kernels.mask import LongformerMask

if not hasattr(_C, "cuda_banded_forward"):
    raise ImportError(
        "the extension led_kernels._C was built without the CUDA kernels "
        f"({build_error('_cuda_build_error.txt') or 'no reason is recorded'}); install CUDA's nvcc and "
        f"{REINSTALL} with LED_KERNELS_CUDA=1, or use another backend."
    )


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
    q, _, scale = positive_scale(q, softmax_scale)
    params = _params(q, k, v, mask, scale, dropout_p, seed)
    params.window_left, params.window_right = window_left, window_right
    return run_forward(_kernel("banded_forward", q.device), params, q, banded_lse_shape(q), mask.is_packed)


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
    q_global, _, scale = positive_scale(q_global, softmax_scale)
    params = _params(q_global, k_global, v_global, mask, scale, dropout_p, seed)
    kernel = _kernel("global_forward", q_global.device)
    return run_forward(kernel, params, q_global, global_lse_shape(q_global), mask.is_packed)


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
    """Gradients of :func:`banded_forward` -> dq, dk, dv, zeros on padding rows."""
    q, sign, scale = positive_scale(q, softmax_scale)
    params = _params(q, k, v, mask, scale, dropout_p, seed)
    params.window_left, params.window_right = window_left, window_right
    kernel = _kernel("banded_backward", q.device)
    dq, dk, dv = run_backward(kernel, params, d_out, d_lse, q, k, v, out, lse, mask.is_packed)
    return (dq if sign == 1 else dq * sign), dk, dv


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
    """Gradients of :func:`global_forward` -> d(q_global), d(k_global), d(v_global), zeros on padding rows."""
    q_global, sign, scale = positive_scale(q_global, softmax_scale)
    params = _params(q_global, k_global, v_global, mask, scale, dropout_p, seed)
    kernel = _kernel("global_backward", q_global.device)
    dq, dk, dv = run_backward(
        kernel, params, d_out, d_lse, q_global, k_global, v_global, out, lse, mask.is_packed
    )
    return (dq if sign == 1 else dq * sign), dk, dv


def architectures() -> tuple[list[int], int]:
    """Compute capabilities (80 is 8.0) that this build holds machine code for, and the one of its PTX, 0 for none."""
    return _C.cuda_architectures()


def describe_build() -> str:
    """:func:`architectures` in words."""
    compiled, ptx = architectures()
    names = ", ".join(f"sm_{a}" for a in compiled)
    return f"{names}, and as PTX of sm_{ptx} for later ones" if ptx else names


def device_type() -> str:
    """Where the kernels run: ``cuda``; ``cpu`` where tests execute them."""
    return _C.cuda_device_type()


def _kernel(op: str, device: torch.device) -> Callable[[_C.AttentionParams], None]:
    launch, workspace_floats = getattr(_C, f"cuda_{op}"), getattr(_C, f"cuda_{op}_workspace")

    def run(params: _C.AttentionParams) -> None:
        # freed at once: torch gives the memory only to what comes later on the same stream
        workspace = torch.empty(workspace_floats(params), dtype=torch.float32, device=device)
        params.set_workspace(memory(workspace))
        with torch.cuda.device_of(workspace):
            launch(params)

    return run


def _params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LongformerMask,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> _C.AttentionParams:
    check_grid(mask, heads=q.shape[-2])
    params = attention_params(q, k, v, mask, softmax_scale, dropout_p)
    if q.device.type == "cuda":
        params.device = q.device.index
        params.stream = torch.cuda.current_stream(q.device).cuda_stream
    if seed is not None:
        params.set_device_seed(memory(seed))
    return params
