"""The CUDA kernels executed on CPU tensors, as compiled by g++ behind a shim: ``pytest tests/emulation/host_cuda``.

The module that holds them takes the place of ``led_kernels._C``, so that this group is a process of its own.
``LED_HOST_CUDA_SCHEDULE`` chooses the order in which CUDA threads run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.emulation.host_cuda.build import build_module

_FOLDER = Path(__file__).parent
_ALONE = (
    "tests/emulation/host_cuda needs a process of its own, where led_kernels._C is another: run "
    "`pytest tests/emulation/host_cuda`"
)


def pytest_configure(config: pytest.Config) -> None:
    if "led_kernels._C" in sys.modules:
        raise pytest.UsageError(f"{_ALONE}; here led_kernels._C was imported before.")
    # LED_HOST_CUDA_MODULE names one that was built before
    file = os.environ.get("LED_HOST_CUDA_MODULE") or build_module()
    spec = importlib.util.spec_from_file_location("led_kernels._C", file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    os.environ["LED_HOST_CUDA"] = "1"  # as TRITON_INTERPRET says it of Triton's interpreter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = sorted({str(item.path) for item in items if _FOLDER not in item.path.parents})
    if others:
        raise pytest.UsageError(f"{_ALONE}, without {others[0]}.")
    items[:] = [item for item in items if _backend(item) in (None, "cuda")]


def _backend(item: pytest.Item) -> str | None:
    """Names the backend of a test that runs on every one."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    return parameters["target"].backend if parameters and "target" in parameters else None
