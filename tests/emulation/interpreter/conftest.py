"""The Triton kernels executed by Triton's interpreter on CPU tensors: ``pytest tests/emulation/interpreter``.

``@triton.jit`` reads TRITON_INTERPRET when it decorates, Triton's own functions included, so that this group is a
process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.emulation.interpreter.guards import guarded_launches
from tests.emulation.interpreter.numerics import exact_numerics
from tests.emulation.interpreter.speed import language_patched_once

_FOLDER = Path(__file__).parent
_ALONE = (
    "tests/emulation/interpreter needs a process of its own (TRITON_INTERPRET=1): run "
    "`pytest tests/emulation/interpreter`"
)


def pytest_configure(config: pytest.Config) -> None:
    if not isinstance(tl.sum, InterpretedFunction):
        raise pytest.UsageError(f"{_ALONE}; here Triton was imported before, for compilation.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = sorted({str(item.path) for item in items if _FOLDER not in item.path.parents})
    if others:
        raise pytest.UsageError(f"{_ALONE}, without {others[0]}.")
    items[:] = [item for item in items if _backend(item) in (None, "triton")]


def _backend(item: pytest.Item) -> str | None:
    """Names the backend of a test that runs on every one."""
    parameters = getattr(item, "callspec", None) and item.callspec.params
    return parameters["target"].backend if parameters and "target" in parameters else None


@pytest.fixture(autouse=True, scope="session")
def launches() -> Iterator[list[InterpretedFunction]]:
    """The kernels launched so far; all of them are guarded and compute in bf16 and tf32 as a GPU does."""
    with language_patched_once(), exact_numerics(), guarded_launches() as launched:
        yield launched
