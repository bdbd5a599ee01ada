"""Captured kernel calls do at every replay what they did; what a replay would leave out is not captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from led_kernels import capture, gemv
from led_kernels.capture import CapturedCalls
from led_kernels.dispatch import backend_module
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from tests.backends import needs_extension

pytestmark = needs_extension


@torch.no_grad()
def test_captured_calls_read_and_write_where_they_did(compiled_calls):
    module, norm = nn.Linear(16, 16), nn.LayerNorm(16)
    x, cache, position = torch.randn(1, 2, 3, 16), torch.zeros(1, 2, 8, 16), torch.tensor([0, 1, 2])
    visible = torch.ones(1, 1, 1, 8, dtype=torch.bool)

    def step() -> torch.Tensor:
        y = few_rows_linear(module, x, gelu=True)
        write_rows(cache, position, y)
        attended = decode_attention(y, cache, cache, visible)
        return few_rows_add_norm(x.view(6, 16), attended.transpose(1, 2).reshape(6, 16), norm)

    captured = CapturedCalls.capture(step)
    assert torch.equal(captured.result, step())
    made = len(compiled_calls)
    for start in (3, 5):
        x.copy_(torch.randn(x.shape))
        position.copy_(torch.arange(start, start + 3))
        visible[..., start:] = False
        cache.zero_()
        captured.replay()
        assert len(compiled_calls) == made  # nothing of Python ran again
        result, written = captured.result.clone(), cache.clone()
        cache.zero_()
        assert torch.equal(result, step())
        assert torch.equal(written, cache)
        made = len(compiled_calls)


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: few_rows_linear(nn.Linear(8, 8), x.repeat(9, 1)),  # more rows than the kernel takes
        lambda x: x.zero_(),
        lambda x: torch.zeros(2),
    ],
)
def test_what_no_replay_would_do_is_not_captured(function):
    assert CapturedCalls.capture(lambda: function(torch.randn(2, 8))) is None
    x = torch.randn(2, 8)
    assert CapturedCalls.capture(lambda: function(x)) is None


@torch.no_grad()
@pytest.mark.parametrize("when", ["__enter__", "__exit__"])
def test_ctrl_c_does_not_leave_a_capture_behind(compiled_calls, monkeypatch, when):
    """Ctrl-C may come when a mode has just been entered, or is about to be left."""

    class Interrupted(capture.CaptureMode):
        def __enter__(self):
            super().__enter__()
            if when == "__enter__":
                raise KeyboardInterrupt
            return self

        def __exit__(self, *error):
            if when == "__exit__":
                raise KeyboardInterrupt
            super().__exit__(*error)

    module, x = nn.Linear(8, 8), torch.randn(2, 8)
    for module_of_mode in (capture, gemv):
        monkeypatch.setattr(module_of_mode, "CaptureMode", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        CapturedCalls.capture(lambda: few_rows_linear(module, x))
    monkeypatch.undo()
    assert torch.equal(x + x, 2 * x)
    assert _get_current_dispatch_mode() is None
    assert CapturedCalls.capture(lambda: few_rows_linear(module, x)) is not None


@torch.no_grad()
def test_a_mode_without_its_recording_steps_aside():
    recording = backend_module("cpu").Recording()
    x = torch.ones(2)
    with capture.CaptureMode(recording):
        assert torch.equal(x + x, 2 * x)
        with recording, pytest.raises(capture._NotReplayable):
            x + x
        assert torch.equal(x + x, 2 * x)
