"""The `triton` backend runs fused kernels on NVIDIA GPUs from Ampere on and on AMD's CDNA 3.

No GPU has run them yet: what stands behind them is Triton's interpreter (``tests/emulation/interpreter``),
ahead-of-time compilation, mostly for sm_80 and sm_90 (``tests/emulation/aot``), and the execution of the sm_80 PTX
by an interpreter (``tests/emulation/ptx``).

Source of the algorithm: Dao, "FlashAttention-2", 2023; of the pattern: Beltagy et al., "Longformer", 2020.
"""

from __future__ import annotations

from torch import Tensor

from led_kernels.backends import _gpu
from led_kernels.call import AttentionCall
from led_kernels.extras import install_extra

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


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes attention by the Triton kernels -> out, lse."""
    return _gpu.run_forward(launch_global_forward if call.is_global else launch_banded_forward, call)


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of :func:`forward` -> dq, dk, dv."""
    launch = launch_global_backward if call.is_global else launch_banded_backward
    return _gpu.run_backward(launch, call, out, lse, d_out, d_lse)
