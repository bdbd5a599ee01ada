"""Which backend serves a call. A named backend never falls back; every refusal says why and what to do."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from led_kernels.extras import REINSTALL, install_extra

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
_MODULES = {"torch": "blockwise"}
_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_ALL_FLOATS = (*_HALF_AND_SINGLE, torch.float64)


class BackendUnavailable(RuntimeError):
    """The named backend cannot run this call; the message says why and what to do."""


def can_run_reference(
    device: torch.device | None = None, dtype: torch.dtype | None = None, raise_error: bool = False
) -> bool:
    """Whether the dense oracle runs here: everywhere, for float dtypes."""
    return _answer("reference", _dtype_refusal(dtype, _ALL_FLOATS), raise_error)


def can_run_torch(
    device: torch.device | None = None, dtype: torch.dtype | None = None, raise_error: bool = False
) -> bool:
    """Whether blockwise torch operations run here: everywhere, for float dtypes."""
    return _answer("torch", _dtype_refusal(dtype, _ALL_FLOATS), raise_error)


def can_run_cpu(
    device: torch.device | None = None, dtype: torch.dtype | None = None, raise_error: bool = False
) -> bool:
    """Whether the compiled CPU kernels run here: needs the extension ``led_kernels._C`` and tensors on the CPU."""
    reason = _device_refusal(device, "cpu") or _import_refusal("cpu") or _dtype_refusal(dtype, _ALL_FLOATS)
    return _answer("cpu", reason, raise_error)


def can_run_triton(
    device: torch.device | None = None, dtype: torch.dtype | None = None, raise_error: bool = False
) -> bool:
    """Whether the Triton kernels run here: a GPU from Ampere or CDNA 3 on, or Triton's interpreter on CPU tensors."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = (
        _triton_refusal()
        or (_device_refusal(device, "cpu") if interpreted else _device_refusal(device, "cuda"))
        or (None if interpreted else _capability_refusal(device))
        or _dtype_refusal(dtype, _HALF_AND_SINGLE)
    )
    return _answer("triton", reason, raise_error)


def can_run_cuda(
    device: torch.device | None = None, dtype: torch.dtype | None = None, raise_error: bool = False
) -> bool:
    """Whether the compiled CUDA kernels run here: an NVIDIA GPU that they were built for, from Turing on."""
    reason = (
        _import_refusal("cuda")
        or _cuda_device_refusal(device, dtype)
        or _dtype_refusal(dtype, _HALF_AND_SINGLE)
    )
    return _answer("cuda", reason, raise_error)


_CAN_RUN = {
    "reference": can_run_reference,
    "torch": can_run_torch,
    "cpu": can_run_cpu,
    "triton": can_run_triton,
    "cuda": can_run_cuda,
}


def can_run(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    raise_error: bool = False,
) -> bool:
    """Whether ``backend`` runs on this device and dtype (``None``: at all).

    Raises:
        BackendUnavailable: if it cannot and ``raise_error``; the message says why and what to do.
        ValueError: for an unknown name.
    """
    if not isinstance(backend, str) or backend not in _CAN_RUN:
        raise ValueError(
            f"backend is {backend!r}; give one of {', '.join(BACKENDS)}, or None to choose by device."
        )
    return _CAN_RUN[backend](device, dtype, raise_error)


def choose_backend(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Name of the backend that serves a call.

    ``backend``, else the environment variable ``LED_KERNELS_BACKEND``, names it and is then never replaced; else the
    device decides: GPU triton, cuda, torch; CPU cpu, torch.

    Raises:
        BackendUnavailable: when the named backend cannot run the call.
        ValueError: for an unknown name.
    """
    named = os.environ.get("LED_KERNELS_BACKEND") or None if backend is None else backend
    if named is not None:
        can_run(named, device, dtype, raise_error=True)
        return named
    preferred = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    chosen = next((name for name in preferred if can_run(name, device, dtype)), "torch")
    if chosen == "torch" and device.type in ("cpu", "cuda"):
        _warn_of_fallback(device.type)
    return chosen


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes as long as torch's
# own: torch.compile would trace into the import of the extension.
choose_backend._dynamo_marked_constant = True


def missing_kernels(device_type: str) -> str | None:
    """Why tensors on ``cpu`` or ``cuda`` are left to torch's operations, and what to do; None if kernels serve them."""
    if device_type == "cpu":
        reason = _import_refusal("cpu")
    else:
        try:
            can_run("triton", torch.device(device_type), raise_error=True)
            return None
        except BackendUnavailable as refusal:
            reason = str(refusal)
        if can_run("cuda", torch.device(device_type)):
            return None
    if reason is None or (hidden := _hidden_installation()) is None:
        return reason
    return (
        f"the installed led_kernels in {hidden}, which has compiled kernels, is hidden by the one in "
        f"{Path(__file__).parent}, which has none; run `pip install -e .` in this clone, or start Python elsewhere."
    )


@functools.cache
def _warn_of_fallback(device_type: str) -> None:
    if (reason := missing_kernels(device_type)) is not None:
        warnings.warn(
            f"led_kernels runs on torch's operations, several times slower than on its own kernels: {reason} "
            "LED_KERNELS_BACKEND=torch silences this.",
            stacklevel=4,
        )


def _hidden_installation() -> Path | None:
    """A led_kernels with an extension, further down in sys.path than this one."""
    here = Path(__file__).parent
    for folder in map(Path, sys.path):
        other = folder / "led_kernels"
        if other.resolve() != here.resolve() and any(other.glob("_C.*")):
            return other
    return None


def backend_module(backend: str) -> ModuleType:
    """The module that holds a backend's four functions."""
    return importlib.import_module(f"led_kernels.backends.{_MODULES.get(backend, backend)}")


def _answer(backend: str, reason: str | None, raise_error: bool) -> bool:
    if reason and raise_error:
        raise BackendUnavailable(f"backend {backend!r} cannot run: {reason}")
    return reason is None


@functools.cache
def _import_refusal(backend: str) -> str | None:
    """Why a backend cannot be imported, in its own words."""
    try:
        backend_module(backend)
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def _triton_refusal() -> str | None:
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


def _capability_refusal(device: torch.device | None) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"Triton has no tensor cores on {torch.cuda.get_device_name(device)}, of compute capability below 8.0; "
            "use backend='cuda' where it was built, or backend='torch'."
        )
    return None


def _cuda_device_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    cuda = backend_module("cuda")
    if cuda.device_type() == "cpu":  # the kernels compiled for the CPU, by tests
        return _device_refusal(device, "cpu")
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs and this torch is for ROCm; use backend='triton' or backend='torch'."
    if refusal := _device_refusal(device, "cuda"):
        return refusal
    return _architecture_refusal(device, dtype)


def _architecture_refusal(device: torch.device | None, dtype: torch.dtype | None) -> str | None:
    """Machine code runs on devices of its major capability from its minor one on, PTX on all from its own on."""
    major, minor = torch.cuda.get_device_capability(device)
    this = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    if (major, minor) < (7, 5):
        return f"{this}, the kernels need 7.5 or newer; use backend='torch'."
    cuda = backend_module("cuda")
    compiled, ptx = cuda.architectures()
    serving = [a for a in compiled if divmod(a, 10) <= (major, minor) and a // 10 == major]
    if not serving and 0 < ptx <= 10 * major + minor:
        serving = [ptx]
    if not serving:
        return (
            f"{this}, the kernels were built for {cuda.describe_build()}; {REINSTALL} with "
            f"LED_KERNELS_CUDA_ARCHS={major}.{minor}, or use another backend."
        )
    if dtype == torch.bfloat16 and max(serving) < 80:
        return (
            f"{this} and runs the code for sm_{max(serving)}, bfloat16 needs sm_80 or newer; use float16 or float32, "
            "or backend='torch'."
        )
    return None


def _device_refusal(device: torch.device | None, wanted: str) -> str | None:
    if device is not None and device.type != wanted:
        return f"it takes tensors on {wanted}, these are on {device.type}; move them or name another backend."
    if wanted == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; install a GPU build of torch and check the driver, or use a CPU backend."
    return None


def _dtype_refusal(dtype: torch.dtype | None, served: tuple[torch.dtype, ...]) -> str | None:
    if dtype is not None and dtype not in served:
        names = ", ".join(str(d).removeprefix("torch.") for d in served)
        return f"it computes in {names}, not {str(dtype).removeprefix('torch.')}; cast the inputs."
    return None
