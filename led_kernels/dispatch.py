"""Chooses the backend that serves a call. A named backend never falls back; every refusal says why and what to do."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from led_kernels.backends import BACKENDS


class BackendUnavailable(RuntimeError):
    """Says that the named backend cannot run a call; the message says why and what to do."""


def can_run(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    raise_error: bool = False,
) -> bool:
    """Tells whether ``backend`` runs on this device and dtype (``None``: at all).

    Raises:
        BackendUnavailable: if it cannot and ``raise_error``; the message says why and what to do.
        ValueError: for an unknown name.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}; give one of {', '.join(BACKENDS)}, or None to choose by device."
        )
    reason = BACKENDS[backend].refusal(device, dtype)
    if reason and raise_error:
        raise BackendUnavailable(f"backend {backend!r} cannot run: {reason}")
    return reason is None


def choose_backend(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Returns the name of the backend that serves a call.

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
    for name, candidate in BACKENDS.items():
        if device.type in candidate.devices and can_run(name, device, dtype):
            return name
    if device.type in ("cpu", "cuda"):
        _warn_of_fallback(device.type)
    return "torch"


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes as long as torch's
# own: torch.compile would trace into the import of the extension.
choose_backend._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]


def missing_kernels(device_type: str) -> str | None:
    """Tells why tensors on ``cpu`` or ``cuda`` are left to torch's operations, and what to do; None if they are not."""
    made_for = [backend for backend in BACKENDS.values() if device_type in backend.devices]
    refusals = [backend.refusal(torch.device(device_type), None) for backend in made_for]
    if None in refusals:
        return None
    if (hidden := _hidden_installation()) is None:
        preferred = made_for[0].name
        return refusals[0] if len(made_for) == 1 else f"backend {preferred!r} cannot run: {refusals[0]}"
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
    """Returns a led_kernels with an extension that lies further down in sys.path than this one."""
    here = Path(__file__).parent
    for folder in map(Path, sys.path):
        other = folder / "led_kernels"
        has_extension = any(path.suffix != ".pyi" for path in other.glob("_C.*"))
        if has_extension and other.resolve() != here.resolve():
            return other
    return None


def backend_module(backend: str) -> ModuleType:
    """Returns the module that holds a backend's ``forward`` and ``backward``."""
    return BACKENDS[backend].load()
