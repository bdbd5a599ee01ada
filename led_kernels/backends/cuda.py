"""The `cuda` backend runs the compiled kernels of csrc/cuda on torch tensors, on NVIDIA GPUs from Turing on.

Allocates outputs and workspaces, passes pointers, and puts the kernels on torch's current stream. Nothing waits for
the device or depends on values that lie there, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from led_kernels.backends import _extension, _gpu
from led_kernels.backends._extension import _C, attention_params, build_error, memory
from led_kernels.call import AttentionCall
from led_kernels.extras import REINSTALL

if not hasattr(_C, "cuda_banded_forward"):
    raise ImportError(
        "the extension led_kernels._C was built without the CUDA kernels "
        f"({build_error('_cuda_build_error.txt') or 'no reason is recorded'}); install CUDA's nvcc and "
        f"{REINSTALL} with LED_KERNELS_CUDA=1, or use another backend."
    )


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Computes attention by the compiled kernels -> out, lse."""

    def launch(call: AttentionCall) -> tuple[Tensor, Tensor]:
        return _extension.run_forward(_kernel("forward", call), _params(call), call, call.mask.is_packed)

    return _gpu.run_forward(launch, call)


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of :func:`forward` -> dq, dk, dv."""

    def launch(
        call: AttentionCall, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel, has_gaps = _kernel("backward", call), call.mask.is_packed
        return _extension.run_backward(kernel, _params(call), call, out, lse, d_out, d_lse, has_gaps)

    return _gpu.run_backward(launch, call, out, lse, d_out, d_lse)


def architectures() -> tuple[list[int], int]:
    """Returns the compute capabilities (80 is 8.0) of this build's machine code, and that of its PTX, 0 for none."""
    return _C.cuda_architectures()


def describe_build() -> str:
    """Says :func:`architectures` in words."""
    compiled, ptx = architectures()
    names = ", ".join(f"sm_{a}" for a in compiled)
    return f"{names}, and as PTX of sm_{ptx} for later ones" if ptx else names


def device_type() -> str:
    """Tells where the kernels run: ``cuda``; ``cpu`` where tests execute them."""
    return _C.cuda_device_type()


def _kernel(direction: str, call: AttentionCall) -> Callable[[_C.AttentionParams], None]:
    name = f"cuda_{'global' if call.is_global else 'banded'}_{direction}"
    launch, workspace_floats = getattr(_C, name), getattr(_C, f"{name}_workspace")

    def run(params: _C.AttentionParams) -> None:
        # freed at once: torch gives the memory only to what comes later on the same stream
        workspace = torch.empty(workspace_floats(params), dtype=torch.float32, device=call.q.device)
        params.set_workspace(memory(workspace))
        launch(params)

    return run


def _params(call: AttentionCall) -> _C.AttentionParams:
    params, device = attention_params(call), call.q.device
    if device.type == "cuda":
        params.device = device.index
        params.stream = torch.cuda.current_stream(device).cuda_stream
    if call.seed is not None:
        params.set_device_seed(memory(call.seed))
    return params
