"""``target``: one backend on one device; every test that takes it runs on each backend that runs here."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # threads of several processes on one processor wait for each other most of the time; torch reads it once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

import pytest
import torch
from hypothesis import settings

from tests import skips
from tests.backends import backends_on, reason_against

# Unless named on the command line: processes of their own. The conftest of interpreter has to come before Triton, which
# led_kernels imports through torch.compiler, that of host_cuda before led_kernels._C: hence the imports inside
# functions here.
collect_ignore = ["emulation/interpreter", "emulation/host_cuda"]

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("random", deadline=None, max_examples=1000)
settings.load_profile("fixed")


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def require(self, dtype: torch.dtype) -> None:
        """Skips the test where the backend was not made for this dtype."""
        if reason := reason_against(self.backend, self.device, dtype):
            pytest.skip(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="also run every backend's tests on the GPU")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu is given, but torch sees no GPU.")
    if config.option.markexpr == "not slow and not gpu":  # the default of pyproject.toml
        config.option.markexpr = "not slow"


@pytest.fixture
def plain_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has bitsandbytes compute as on any processor.

    For AVX-512 BF16 it lays weights out anew, rounds their scales, and fails for layers as small as those of tests.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.hookimpl(trylast=True)  # targets vary fastest, so that they share the reference's results
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    devices = ["cpu", "cuda"] if metafunc.config.getoption("--gpu") else ["cpu"]
    targets = [Target(backend, device) for device in devices for backend in backends_on(device)]
    params = [
        pytest.param(target, id=str(target), marks=[pytest.mark.gpu] if target.device == "cuda" else [])
        for target in targets
    ]
    metafunc.parametrize("target", params)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU; run pytest --gpu on a machine that has one")
            )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    skips.note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    skips.note(report)
