"""The GPU kernels' sm_80 PTX executed on CPU tensors: ``pytest tests/emulation/ptx``."""

from __future__ import annotations

import dataclasses

import pytest

from led_kernels.backends import BACKENDS


@pytest.fixture(autouse=True)
def _triton_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are captured before they need a device: the backend takes what the fake driver stands for."""
    triton = dataclasses.replace(BACKENDS["triton"], why_not=lambda device, dtype: None)
    monkeypatch.setitem(BACKENDS, "triton", triton)
