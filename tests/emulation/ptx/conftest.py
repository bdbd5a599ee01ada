"""The GPU kernels' sm_80 PTX executed on CPU tensors: ``pytest tests/emulation/ptx``."""

from __future__ import annotations

import pytest

from led_kernels import dispatch


@pytest.fixture(autouse=True)
def _triton_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are captured before they need a device: the backend takes what the fake driver stands for."""
    monkeypatch.setitem(dispatch._CAN_RUN, "triton", lambda device=None, dtype=None, raise_error=False: True)
