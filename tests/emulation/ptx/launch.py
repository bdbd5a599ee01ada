"""Runs what ``benchmarks.static.fake_driver`` captured: launchers of Triton kernels compute, on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.static.fake_driver import Launch, captured_launches

from .machine import compiled, execute
from .memory import GlobalMemory


@contextlib.contextmanager
def executed_launches(edit_ptx: Callable[[str, str], str] | None = None) -> Iterator[list[Launch]]:
    """Within the context every Triton kernel that is launched is compiled for sm_80 and its PTX executed.

    Args:
        edit_ptx: ``(kernel name, PTX) -> PTX``, for tests of the tests.
    """

    def on_launch(launch: Launch) -> None:
        ptx = launch.kernel.asm["ptx"]
        run(launch, edit_ptx(launch.name, ptx) if edit_ptx else ptx)

    with captured_launches("sm_80", on_launch) as launches:
        yield launches


def run(launch: Launch, ptx: str) -> None:
    """Executes the PTX with the launch's grid and arguments; results go to the tensors themselves."""
    program, memory = compiled(ptx), GlobalMemory()
    values = []
    for name, (type_name, value) in launch.parameters.items():
        if isinstance(value, torch.Tensor):
            assert type_name.startswith("*"), f"{name}: a tensor for a parameter of type {type_name}"
            values.append(memory.add_tensor(name, value))
        elif isinstance(value, float):
            values.append(int(np.array(value, np.float32).view(np.uint32)))
        else:
            values.append(int(value))
    # after them come pointers to scratch memory, which no kernel here uses: null
    names = list(program.entry.parameters)
    values += [0] * (len(names) - len(values))
    parameters = {name: value & (2**64 - 1) for name, value in zip(names, values, strict=True)}
    execute(program, launch.grid, parameters, memory, launch.kernel.metadata.shared)
