"""Any shape, window, padding and set of global tokens, drawn by hypothesis, against the reference.

The examples are the same on every run; ``--hypothesis-profile=random`` draws others, and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from led_kernels import LongformerMask
from led_kernels.testing import AttentionCase, assert_matches_reference

sides = st.one_of(st.integers(-1, 12), st.integers(13, 90), st.just(10**9))
windows = st.one_of(sides, st.tuples(sides, sides))
kinds = st.sampled_from(((0, 1, 2), (1,), (1, 1, 1, 1, 2), (0, 0, 0, 1, 2), (2,), (0, 1)))


@dataclass(frozen=True)
class DrawnCase(AttentionCase):
    """Kinds of all rows, batch entry after batch entry; packed sequences have their own lengths and no padding."""

    kinds: tuple[tuple[int, ...], ...] = ()

    def mask(self, device: torch.device | str = "cpu") -> LongformerMask:
        if not self.packed:
            return LongformerMask.from_padding(torch.tensor(self.kinds)).to(device)
        lengths = torch.tensor([0, *(len(row) for row in self.kinds)])
        index = [[i for i, kind in enumerate(row) if kind == 2] for row in self.kinds]
        width = max(len(row) for row in index)
        index = torch.tensor([row + [-1] * (width - len(row)) for row in index]).view(len(index), width)
        return LongformerMask.packed(lengths.cumsum(0), index).to(device)


@st.composite
def cases(draw: st.DrawFn) -> DrawnCase:
    packed, batch = draw(st.booleans()), draw(st.integers(1, 3))
    seqlen = draw(st.integers(1, 90))
    lengths = [draw(st.integers(0, seqlen)) if packed and b else seqlen for b in range(batch)]
    choices = [tuple(max(kind, int(packed)) for kind in draw(kinds)) for _ in range(batch)]
    rows = tuple(
        tuple(draw(st.lists(st.sampled_from(choice), min_size=length, max_size=length)))
        for choice, length in zip(choices, lengths, strict=True)
    )
    return DrawnCase(
        batch=batch,
        seqlen=seqlen,
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 40)),
        window_size=draw(windows),
        packed=packed,
        softmax_scale=draw(st.sampled_from((None, 0.3))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.25))),
        kinds=rows,
    )


@pytest.mark.parametrize("op", ["banded", "global", "longformer"])
@given(case=cases(), dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_matches_reference(op, target, case, dtype):
    target.require(dtype)
    # wider than by default: where a row has one key, gradients vanish but for the rounding of out, and plain's error
    floor = {torch.float32: 32, torch.float64: 256, torch.bfloat16: 16}[dtype]
    assert_matches_reference(op, case, target.backend, target.device, dtype, floor_ulps=floor)
