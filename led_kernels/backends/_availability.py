"""These functions tell why a backend cannot run here, by what it needs of this machine, without running it."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from led_kernels.extras import REINSTALL, install_extra


def nothing_missing(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Refuses nothing, for backends that run everywhere."""
    return None


def cpu_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Refuses tensors elsewhere than on the CPU, and everything without the extension ``led_kernels._C``."""
    return _device_refusal(device, "cpu") or import_refusal("cpu")


def triton_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Refuses all but a GPU from Ampere or CDNA 3 on, or Triton's interpreter and tensors on the CPU."""
    if refusal := _missing_triton():
        return refusal
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _device_refusal(device, "cpu")
    return _device_refusal(device, "cuda") or _tensor_core_refusal(device)


def cuda_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Refuses all but an NVIDIA GPU, from Turing on, that the compiled CUDA kernels were built for."""
    if refusal := import_refusal("cuda"):
        return refusal
    if _cuda_module().device_type() == "cpu":  # the kernels compiled for the CPU, by tests
        return _device_refusal(device, "cpu")
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs and this torch is for ROCm; use backend='triton' or backend='torch'."
    return _device_refusal(device, "cuda") or _architecture_refusal(device, dtype)


@functools.cache
def import_refusal(module: str) -> str | None:
    """Tells why a module of this package cannot be imported, in its own words."""
    try:
        importlib.import_module(f"led_kernels.backends.{module}")
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def _missing_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return (
            f"Triton cannot be imported ({error}); CUDA and ROCm builds of torch bring it, elsewhere "
            f"{install_extra('triton')}, or use backend='torch'."
        )
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return (
            f"Triton is {triton.__version__}, the kernels need 3.6 or newer; upgrade torch to 2.11 or newer."
        )
    return None


def _tensor_core_refusal(device: torch.device | None) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"Triton has no tensor cores on {torch.cuda.get_device_name(device)}, of compute capability below 8.0; "
            "use backend='cuda' where it was built, or backend='torch'."
        )
    return None


def _architecture_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Machine code runs on devices of its major capability from its minor one on, PTX on all from its own on."""
    major, minor = torch.cuda.get_device_capability(device)
    this = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    if (major, minor) < (7, 5):
        return f"{this}, the kernels need 7.5 or newer; use backend='torch'."
    compiled, ptx = _cuda_module().architectures()
    serving = [a for a in compiled if divmod(a, 10) <= (major, minor) and a // 10 == major]
    if not serving and 0 < ptx <= 10 * major + minor:
        serving = [ptx]
    if not serving:
        return (
            f"{this}, the kernels were built for {_cuda_module().describe_build()}; {REINSTALL} with "
            f"LED_KERNELS_CUDA_ARCHS={major}.{minor}, or use another backend."
        )
    if dtype == torch.bfloat16 and max(serving) < 80:
        return (
            f"{this} and runs the code for sm_{max(serving)}, bfloat16 needs sm_80 or newer; use float16 or float32, "
            "or backend='torch'."
        )
    return None


def _cuda_module():
    return importlib.import_module("led_kernels.backends.cuda")


def _device_refusal(device: torch.device | None, wanted: str) -> str | None:
    if device is not None and device.type != wanted:
        return f"it takes tensors on {wanted}, these are on {device.type}; move them or name another backend."
    if wanted == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; install a GPU build of torch and check the driver, or use a CPU backend."
    return None
