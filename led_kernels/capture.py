"""Kernel calls on the CPU are recorded here once and replayed without Python, as a CUDA graph does it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode

from led_kernels.dispatch import backend_module, choose_backend
from led_kernels.eager import is_plain_surroundings

if TYPE_CHECKING:
    from led_kernels._C import Recording


class CapturedCalls:
    """Holds the kernel calls of one function, recorded once, which :meth:`replay` makes again.

    A decoding step makes a hundred calls, which take a fifth of its time from Python. Every tensor that the calls read
    and ``result``, which the function returned, are at fixed addresses: replaying reads what is there at that time, and
    overwrites ``result``.
    """

    def __init__(
        self, result: Tensor, recording: Recording, kept: list[Tensor], written: list[Tensor]
    ) -> None:
        self.result = result
        self._recording = recording
        self._kept = kept  # tensors whose memory the recorded calls point to
        self._written = written  # tensors of callers, whose version autograd compares

    @classmethod
    def capture(cls, function: Callable[[], Tensor]) -> CapturedCalls | None:
        """Runs ``function`` and records its kernel calls.

        Returns:
            The calls, or ``None`` when a replay would leave something out: another operation than kernels, views and
            allocations ran in the function, or a mode of the caller's looks on.
        """
        if choose_backend(torch.device("cpu"), torch.float32) != "cpu" or not is_plain_surroundings():
            return None
        recording = backend_module("cpu").Recording()
        mode = CaptureMode(recording)
        try:
            with mode, recording:
                result = function()
        except _NotReplayable:
            return None
        finally:
            if _get_current_dispatch_mode() is mode:  # Ctrl-C came while it was entered or left
                _pop_mode()
        return cls(result, recording, mode.kept, [result, *mode.written])

    def replay(self) -> None:
        """Makes the recorded calls again."""
        self._recording.replay()
        increment_version(self._written)


class CaptureMode(TorchDispatchMode):
    """Lets views and allocations pass while kernel calls are recorded, and refuses every other operation of torch.

    It does so only while ``recording`` is the current one. Ctrl-C can leave the mode in place, which Python code enters
    and leaves, but not the recording, which compiled code does.
    """

    _ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self.kept: list[Tensor] = []  # what was allocated
        self.written: list[Tensor] = []  # what mark_written was told

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._recording.is_current:
            return func(*args, **kwargs or {})
        if func in self._ALLOCATIONS:
            tensor = func(*args, **kwargs or {})
            self.kept.append(tensor)
            return tensor
        if not func.is_view:
            raise _NotReplayable(str(func))
        return func(*args, **kwargs or {})


class _NotReplayable(Exception):
    """Is raised for an operation of torch, which no replay of kernel calls would do."""


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel wrote into ``tensor``, and the capture in progress that its replays will."""
    increment_version(tensor)
    if isinstance(mode := _get_current_dispatch_mode(), CaptureMode):
        mode.written.append(tensor)
