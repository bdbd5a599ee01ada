"""Bounds of the memory that interpreted kernels touch: the interpreter itself reads and writes any address.

Each launch runs on copies of its tensors. A copy lies alone in its buffer; what is before and behind it, and between
its elements where it is a view, is filled with NaN (integers: with a pattern). A load or store whose address lies
outside of the tensors stops at once, and after the launch everything but the elements must be as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

GUARD = 4096  # bytes before and behind, at least
MAX_EXTENT = 2**28  # elements of a tensor, gaps included: copies of more would fill the memory
ALIGNMENT = 64  # of torch's allocations in bytes; a view's address keeps its remainder
INTEGER_FILL = 0xA5


class OutOfBounds(Exception):
    """A kernel touched memory that is not its tensors'."""


class GuardedTensor:
    """A copy of a tensor, of the same strides, amid guards.

    Attributes:
        tensor: the copy, for the kernel.
        start, stop: the addresses in bytes from its first element on to behind its last.
    """

    def __init__(self, name: str, original: Tensor) -> None:
        self.name = name
        self._original = _bits(_without_repeats(original))
        extent = 1 + sum(
            (n - 1) * stride for n, stride in zip(original.shape, original.stride(), strict=True)
        )
        if extent > MAX_EXTENT:
            raise ValueError(f"{name} spans {extent:,} elements; a launcher copies such tensors.")
        lead = (GUARD + original.data_ptr() % ALIGNMENT) // original.itemsize
        size = -(-(lead + extent + GUARD // original.itemsize) // ALIGNMENT) * ALIGNMENT
        self._buffer = torch.empty(size, dtype=original.dtype)
        if original.is_floating_point():
            self._buffer.fill_(float("nan"))
        else:
            self._buffer.view(torch.uint8).fill_(INTEGER_FILL)
        self._untouched = self._buffer.clone()
        self.tensor = self._buffer.as_strided(original.shape, original.stride(), lead)
        self._elements = _bits(_without_repeats(self.tensor))
        self._elements.copy_(self._original)
        self.start = self._buffer.data_ptr() + lead * original.itemsize
        self.stop = self.start + (extent * original.itemsize if original.numel() else 0)

    def contains(self, address: int) -> bool:
        """Tells whether an address lies in the tensor or its guards."""
        start = self._buffer.data_ptr()
        return start <= address < start + self._buffer.nbytes

    def check_guards(self) -> None:
        """Raises :class:`OutOfBounds` when something else than the elements was written."""
        expected = self._untouched.as_strided(
            self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        )
        _bits(_without_repeats(expected)).copy_(self._elements)
        changed = (_bits(self._untouched) != _bits(self._buffer)).nonzero()
        if len(changed):
            element = int(changed[0]) - self.tensor.storage_offset()
            raise OutOfBounds(
                f"{len(changed)} elements beside {self.name} were written, the first at {element}"
            )

    def copy_back(self) -> None:
        """Copies what the kernel wrote; tensors that it only read stay, so that views of one memory may be given."""
        if not torch.equal(self._original, self._elements):
            self._original.copy_(self._elements)


@contextmanager
def guarded_launches() -> Iterator[list[InterpretedFunction]]:
    """Guards launches within the context; gives the list of the kernels launched.

    Raises:
        triton.runtime.errors.InterpreterError: caused by :class:`OutOfBounds`, for a load or store outside the tensors.
        OutOfBounds: after the launch, when something beside the elements was written.
    """
    launched: list[InterpretedFunction] = []
    tensors: list[GuardedTensor] = []  # of the launch under way
    run = InterpretedFunction.run
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def guarded_run(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launched.append(self)
        tensors[:] = _guard(arguments)
        result = run(self, grid=grid, warmup=warmup, **arguments)
        for tensor in tensors:
            tensor.check_guards()
        for tensor in tensors:
            tensor.copy_back()
        return result

    def checked_load(self, ptrs, mask, *args, **kwargs):
        _check_access("load", ptrs, mask, tensors)
        return load(self, ptrs, mask, *args, **kwargs)

    def checked_store(self, ptrs, value, mask, *args, **kwargs):
        _check_access("store", ptrs, mask, tensors)
        return store(self, ptrs, value, mask, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", guarded_run)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield launched


def _guard(arguments: dict[str, object]) -> list[GuardedTensor]:
    """Replaces the tensors among the arguments, those of descriptors too; a tensor given twice is one copy."""
    copies: dict[tuple, GuardedTensor] = {}
    for name, argument in arguments.items():
        x = argument.base if isinstance(argument, TensorDescriptor) else argument
        if isinstance(x, Tensor):
            key = (x.data_ptr(), x.dtype, x.shape, x.stride())
            copy = copies.setdefault(key, GuardedTensor(name, x)).tensor
            arguments[name] = copy if x is argument else replace(argument, base=copy)
    return list(copies.values())


def _check_access(access: str, ptrs: TensorHandle, mask: TensorHandle, tensors: list[GuardedTensor]) -> None:
    addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
    if not addresses.size:
        return
    low, high = int(addresses.min()), int(addresses.max())
    if any(tensor.start <= low and high < tensor.stop for tensor in tensors):
        return
    for tensor in tensors:
        inside = (addresses >= tensor.start) & (addresses < tensor.stop)
        if inside.any() or tensor.contains(low) or tensor.contains(high):
            element = (int(addresses[~inside][0]) - tensor.start) // tensor.tensor.itemsize
            shape, strides = tuple(tensor.tensor.shape), tensor.tensor.stride()
            raise OutOfBounds(
                f"{access} outside of {tensor.name} {shape}, strides {strides}: {(~inside).sum()} of {inside.size} "
                f"elements, the first at {element}"
            )
    raise OutOfBounds(f"{access} far from every tensor, at {low:#x} to {high:#x}")


def _without_repeats(x: Tensor) -> Tensor:
    """Returns the elements of an expanded tensor once each."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _bits(x: Tensor) -> Tensor:
    """Views the same memory as integers, in which NaN equals itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
