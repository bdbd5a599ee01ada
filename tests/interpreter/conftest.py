"""The Triton kernels executed by Triton's interpreter on CPU tensors: ``pytest tests/interpreter``.

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

from tests.interpreter.guards import guarded_launches
from tests.interpreter.numerics import exact_numerics

_FOLDER = Path(__file__).parent
_ALONE = "tests/interpreter needs a process of its own (TRITON_INTERPRET=1): run `pytest tests/interpreter`"


def pytest_configure(config: pytest.Config) -> None:
    if not isinstance(tl.sum, InterpretedFunction):
        raise pytest.UsageError(f"{_ALONE}; here Triton was imported before, for compilation.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = sorted({str(item.path) for item in items if _FOLDER not in item.path.parents})
    if others:
        raise pytest.UsageError(f"{_ALONE}, without {others[0]}.")


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> Iterator[None]:
    with exact_numerics(), guarded_launches():
        yield
