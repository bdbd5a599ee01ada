"""Compiles real Triton launchers on a machine without a GPU.

``with captured_launches("sm_80") as launches:`` every ``kernel[grid](...)`` of a ``@triton.jit`` function, on CPU
tensors, is compiled for that target by Triton itself, with the configuration, specialization and compile cache of a
real launch, and recorded instead of run::

    with captured_launches("sm_80") as launches:
        banded_forward(q, k, v, mask, ...)
    print(launches[0].name, launches[0].grid, launches[0].kernel.metadata.num_warps)
    ptx = launches[0].kernel.asm["ptx"]

Outputs of the launchers hold whatever they were allocated with, unless ``on_launch`` computes them. Works with Triton
3.6 to 3.9, in a process where ``TRITON_INTERPRET`` was not set when the kernels were decorated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.static.gpus import GPUS, TARGETS


@dataclass(frozen=True)
class Launch:
    """Holds a launch that was compiled.

    Attributes:
        name: the kernel's function name.
        target: ``sm_80`` ... ``gfx942``.
        grid: three ints.
        arguments: the value of every parameter by name, constexprs and defaults included, in the order of the
            kernel's signature; tensors are those that the launcher passed.
        constexprs: the values that were compiled in: parameters marked constexpr, and those Triton specialized
            away (an int that is 1, or None).
        kernel: Triton's ``CompiledKernel``: ``asm["ttgir" | "ptx" | "cubin" | "amdgcn"]``; ``metadata.shared`` in
            bytes, ``metadata.num_warps``; ``hash`` tells compilations apart.
    """

    name: str
    target: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    kernel: Any

    @property
    def parameters(self) -> dict[str, tuple[str, Any]]:
        """Returns Triton type (``*bf16``, ``i32``, ``fp32``) and value of the arguments of the compiled function,
        in order. After them it takes the pointers to global and profiling scratch memory.
        """
        signature = self.kernel.src.signature
        return {
            name: (signature[name], value)
            for name, value in self.arguments.items()
            if signature[name] != "constexpr"
        }


@contextlib.contextmanager
def captured_launches(
    target: str, on_launch: Callable[[Launch], None] | None = None
) -> Iterator[list[Launch]]:
    """Compiles launches within the context for ``target``, and appends them to the list that it gives.

    Args:
        target: ``sm_80`` ... ``gfx942``, one of :data:`benchmarks.static.gpus.TARGETS`.
        on_launch: called with each launch after it was compiled; may execute it.

    Raises:
        RuntimeError: Triton's interpreter is on, so that there is nothing to compile.
        triton.runtime.errors.OutOfResources: a launch needs more shared memory than the target has.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            launches.append(_record(self, kernel, target, grid, args, kwargs))
            if on_launch is not None:
                on_launch(launches[-1])
        return kernel

    with _faked(_FakeDriver(target), compile_only):
        yield launches


@contextlib.contextmanager
def compilation_keys(target: str) -> Iterator[dict[str, set[str]]]:
    """Compiles nothing within the context: it gives, by the kernel's module and name, the compilations that
    its launches would need.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    keys: dict[str, set[str]] = {}
    run, runtime = JITFunction.run, triton.knobs.runtime

    def keep_key(*, key, fn, **_) -> bool:
        keys.setdefault(f"{fn.module}.{fn.jit_function.__name__}", set()).add(str(key))
        return True  # nothing more to do

    def look_up_only(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    before = runtime.jit_cache_hook
    # a device of its own, for which nothing is compiled yet
    with _faked(_FakeDriver(target, device=object()), look_up_only):
        runtime.jit_cache_hook = keep_key
        try:
            yield keys
        finally:
            runtime.jit_cache_hook = before


@contextlib.contextmanager
def _faked(fake: _FakeDriver, run: Callable) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: launches would be interpreted, not compiled.")
    # the attribute, since the property would look for a GPU
    driver_before, run_before = driver._active, JITFunction.run
    driver.set_active(fake)
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = run_before
        driver._active = driver_before


def gpu_target(target: str) -> GPUTarget:
    """Returns Triton's name of the target."""
    if target not in TARGETS:
        raise ValueError(f"Unknown target {target!r}; known: {', '.join(TARGETS)}.")
    if target.startswith("gfx"):
        return GPUTarget("hip", target, GPUS[target].warp_size)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), GPUS[target].warp_size)


class _FakeDriver:
    """Answers what Triton's compiler and ``JITFunction.run`` ask of a driver."""

    def __init__(self, target: str, device: object = None) -> None:
        self.name = target
        self.target = gpu_target(target)
        # compiled kernels are kept by device: the target keeps those of different targets apart
        self.device = device or self.target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_device_properties(self, device: object) -> dict[str, int | str]:
        gpu = GPUS[self.name]
        return {
            "max_shared_mem": gpu.shared_per_block,
            "multiprocessor_count": gpu.multiprocessors,
            "max_num_regs": gpu.registers,
            "warpSize": gpu.warp_size,
            "arch": self.name,
        }

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


def _record(function: JITFunction, kernel, target: str, grid, args: tuple, kwargs: dict) -> Launch:
    names = function.signature.parameters
    bound = function.signature.bind(*args, **{name: x for name, x in kwargs.items() if name in names})
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if callable(grid):
        grid = grid(arguments)
    shared, limit = kernel.metadata.shared, GPUS[target].shared_per_block
    if shared > limit:
        raise triton.runtime.errors.OutOfResources(shared, limit, "shared memory")
    signature = kernel.src.signature
    return Launch(
        name=function.__name__,
        target=target,
        grid=(*grid, 1, 1)[:3],
        arguments=arguments,
        constexprs={name: value for name, value in arguments.items() if signature[name] == "constexpr"},
        kernel=kernel,
    )
