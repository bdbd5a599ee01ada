"""Backends are registered here. Each is a module of this package, imports no other backend and holds two functions.

``forward(call) -> (out, lse)`` and ``backward(call, out, lse, d_out, d_lse) -> (dq, dk, dv)``, where ``call`` is a
:class:`led_kernels.call.AttentionCall` that was checked, ``d_out`` has any strides and ``d_lse`` may be None. Modules
whose names begin with an underscore are what several backends share.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from led_kernels.backends import _availability

_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
_ALL_FLOATS = (*_HALF_AND_SINGLE, torch.float64)


@dataclass(frozen=True)
class Backend:
    """Holds what is known of a backend without importing it.

    Attributes:
        name: what ``backend=`` and ``LED_KERNELS_BACKEND`` call it.
        module: the module of this package that holds it.
        devices: the types of device whose tensors go to it when no backend is named.
        dtypes: what it computes in.
        why_not: says why it cannot run on a device and dtype (None: any), or None if it can.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[torch.device | None, torch.dtype | None], str | None]

    def refusal(self, device: torch.device | None, dtype: torch.dtype | None) -> str | None:
        """Tells why it cannot serve a call on this device in this dtype, and what to do; None if it can."""
        if reason := self.why_not(device, dtype):
            return reason
        if dtype is not None and dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"it computes in {names}, not {str(dtype).removeprefix('torch.')}; cast the inputs."
        return None

    def load(self) -> ModuleType:
        """Returns the module with its ``forward`` and ``backward``.

        Raises:
            ImportError: when what it needs is not installed.
        """
        return importlib.import_module(f"led_kernels.backends.{self.module}")


# Of two that are for one type of device, the first that can run is taken; `torch` is for all that is left over.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "reference", (), _ALL_FLOATS, _availability.nothing_missing),
        Backend("torch", "blockwise", (), _ALL_FLOATS, _availability.nothing_missing),
        Backend("cpu", "cpu", ("cpu",), _ALL_FLOATS, _availability.cpu_refusal),
        Backend("triton", "triton", ("cuda",), _HALF_AND_SINGLE, _availability.triton_refusal),
        Backend("cuda", "cuda", ("cuda",), _HALF_AND_SINGLE, _availability.cuda_refusal),
    )
}
