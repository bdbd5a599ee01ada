"""The `triton` backend: fused kernels for NVIDIA GPUs from Ampere on and for AMD's CDNA 3.

No GPU has run them yet: what stands behind them is Triton's interpreter (``tests/emulation/interpreter``),
ahead-of-time compilation, mostly for sm_80 and sm_90 (``tests/emulation/aot``), and the execution of the sm_80 PTX
by an interpreter (``tests/emulation/ptx``).

Source of the algorithm: Dao, "FlashAttention-2", 2023; of the pattern: Beltagy et al., "Longformer", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from led_kernels.backends._gpu import positive_scale
from led_kernels.extras import install_extra
from led_kernels.mask import LongformerMask

try:
    from led_kernels.backends.triton.banded_backward import launch_banded_backward
    from led_kernels.backends.triton.banded_forward import launch_banded_forward
    from led_kernels.backends.triton.global_backward import launch_global_backward
    from led_kernels.backends.triton.global_forward import launch_global_forward
except ImportError as error:
    raise ImportError(
        f"Triton cannot be imported ({error}); CUDA and ROCm builds of torch bring it, elsewhere "
        f"{install_extra('triton')}, or use backend='torch'."
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
    q, _, scale = positive_scale(q, softmax_scale)
    with torch.cuda.device_of(q):
        return launch_banded_forward(q, k, v, mask, window_left, window_right, scale, dropout_p, seed)


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
    with torch.cuda.device_of(q_global):
        return launch_global_forward(q_global, k_global, v_global, mask, scale, dropout_p, seed)


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
    with torch.cuda.device_of(q):
        dq, dk, dv = launch_banded_backward(
            d_out, d_lse, q, k, v, out, lse, mask, window_left, window_right, scale, dropout_p, seed
        )
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
    with torch.cuda.device_of(q_global):
        dq, dk, dv = launch_global_backward(
            d_out, d_lse, q_global, k_global, v_global, out, lse, mask, scale, dropout_p, seed
        )
    return (dq if sign == 1 else dq * sign), dk, dv
