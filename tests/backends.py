"""Where each backend has to run, by what is installed and what it was made for.

Tests ask here and not ``led_kernels.dispatch``: a backend that refuses what it was made for fails its tests, where a
test that asked the backend itself would be skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

import pytest
import torch

_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {
    "reference": (*_HALF_AND_SINGLE, torch.float64),
    "torch": (*_HALF_AND_SINGLE, torch.float64),
    "cpu": (*_HALF_AND_SINGLE, torch.float64),
    "triton": _HALF_AND_SINGLE,
    "cuda": _HALF_AND_SINGLE,
}


def has_extension() -> bool:
    """Tells whether ``led_kernels._C`` was built, also where its import fails; imports nothing."""
    if "led_kernels._C" in sys.modules:
        return True
    package = importlib.util.find_spec("led_kernels")
    return PathFinder.find_spec("led_kernels._C", package.submodule_search_locations) is not None


needs_extension = pytest.mark.skipif(not has_extension(), reason="the extension led_kernels._C is not built")


def has_cuda_kernels() -> bool:
    """Tells whether the extension was built with the CUDA kernels."""
    if not has_extension():
        return False
    from led_kernels import _C

    return hasattr(_C, "cuda_banded_forward")


def reason_against(backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Tells why a backend was not made for this device or dtype; None where it has to run."""
    if dtype is not None and dtype not in DTYPES[backend]:
        return f"{backend} does not compute in {dtype}"
    if backend in ("reference", "torch"):
        return None
    if backend == "cpu":
        if device != "cpu":
            return "the cpu backend is for tensors on the CPU"
        return None if has_extension() else "the extension led_kernels._C is not built"
    if device == "cpu":
        executed = {"triton": os.environ.get("TRITON_INTERPRET"), "cuda": os.environ.get("LED_HOST_CUDA")}
        return None if executed[backend] == "1" else f"the {backend} backend is for GPUs"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    ampere = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    if backend == "triton":
        return None if ampere else "Triton has no tensor cores before compute capability 8.0"
    if torch.version.hip is not None:
        return "the cuda backend is for NVIDIA's GPUs"
    if not has_cuda_kernels():
        return "the extension was built without the CUDA kernels"
    return None if ampere or dtype != torch.bfloat16 else "bfloat16 needs compute capability 8.0"


def backends_on(device: str) -> list[str]:
    """Backends under test on a device, which are all but the oracle."""
    return [name for name in DTYPES if name != "reference" and reason_against(name, device) is None]
