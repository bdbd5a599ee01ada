"""Fixtures that several tests of the kernels use."""

from __future__ import annotations

from functools import partial

import pytest

from led_kernels.dispatch import backend_module


@pytest.fixture
def compiled_calls(monkeypatch) -> list[str]:
    """Names of the compiled functions for few rows, in the order in which they run."""
    made: list[str] = []
    cpu = backend_module("cpu")

    def spy(name, function, *args):
        made.append(name)
        return function(*args)

    for name in ("write_rows", "few_rows_linear", "few_rows_add_norm", "decode_attention"):
        monkeypatch.setattr(cpu, name, partial(spy, name, getattr(cpu, name)))
    return made
