"""What autograd keeps for the backward of one forward is recorded here, by the hooks that every saved tensor passes.

No hook is set on a module, for one with hooks may run other code: who saves is read off the stack of Python's frames.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

CHECKPOINT = "checkpoint"  # stands for the functions of torch.utils.checkpoint, which keep a call's arguments


@dataclass(frozen=True)
class Saved:
    """Holds one block of memory that is kept for the backward.

    Attributes:
        sites: who saved it, in order: the dotted name of the innermost module at work, and the function it was in.
        shape, dtype: of the tensor that was saved first; others may be views of the same memory.
        nbytes: of the whole block.
        is_weight: whether it is the copy of a parameter in another dtype, which autocast makes.
    """

    sites: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    is_weight: bool


def saved_tensors(model: nn.Module, forward: Callable[[], object]) -> list[Saved]:
    """Runs ``forward`` and returns what is kept while its result lives, without parameters and buffers of ``model``."""
    names = {module: name for name, module in model.named_modules()}
    handles: list[tuple[weakref.ref[_Handle], tuple[str, str]]] = []

    def pack(tensor: Tensor) -> _Handle:
        handle = _Handle(tensor.detach())
        handles.append((weakref.ref(handle), _site(names)))
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        result = forward()
    blocks: dict[int, list[tuple[Tensor, tuple[str, str]]]] = {}
    for reference, site in handles:
        if (handle := reference()) is not None:  # what was saved and dropped again is not kept
            blocks.setdefault(handle.tensor.untyped_storage().data_ptr(), []).append((handle.tensor, site))
    own = [*model.parameters(), *model.buffers()]
    for tensor in own:
        blocks.pop(tensor.untyped_storage().data_ptr(), None)
    saved = [_block(block, own) for block in blocks.values() if block[0][0].numel()]
    del result
    return saved


class _Handle:
    """Stands for a tensor in the graph, and dies with its node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _site(names: dict[nn.Module, str]) -> tuple[str, str]:
    """Returns the innermost module at work and the function; under checkpointing the module that is computed again."""
    frame: FrameType | None = sys._getframe(2)
    function = ""
    while frame is not None:
        is_checkpoint = frame.f_code.co_filename == torch.utils.checkpoint.__file__
        # torch.utils.checkpoint has the module as its argument `function`.
        module = frame.f_locals.get("function" if is_checkpoint else "self")
        if is_checkpoint or function != CHECKPOINT:
            called, function = function, CHECKPOINT if is_checkpoint else frame.f_code.co_name
        if isinstance(module, nn.Module) and module in names:
            return names[module], function if function == CHECKPOINT else called or function
        frame = frame.f_back
    return "", function


def _block(block: list[tuple[Tensor, tuple[str, str]]], parameters: list[Tensor]) -> Saved:
    tensor = block[0][0]
    return Saved(
        sites=tuple(site for _, site in block),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        nbytes=tensor.untyped_storage().nbytes(),
        is_weight=any(_is_cast_of(tensor, parameter) for parameter in parameters),
    )


def _is_cast_of(tensor: Tensor, parameter: Tensor) -> bool:
    """Tells whether the tensor holds the values of a parameter in another dtype, transposed or not."""
    if tensor.dtype == parameter.dtype or tensor.numel() != parameter.numel():
        return False
    rounded = parameter.detach().to(tensor.dtype)
    return any(
        tensor.shape == same.shape and torch.equal(tensor, same)
        for same in ((rounded, rounded.t()) if rounded.dim() == 2 else (rounded,))
    )
