"""The kernels of more than one backend are tried with these, beside ``led_kernels.testing``'s cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from led_kernels.testing import AttentionCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("banded", "global")
WINDOWS = (0, 1, 7, 16, 40, (3, 0), (0, 5), (50, 2), (2, 33), -1, (-1, 4), (6, -1), 1000)
PADDINGS = ("none", "right", "left", "holes", "all")
EVERY = tuple(range(67))
GLOBALS = {
    "none": ((), ()),
    "first": ((0,), (0,)),
    "last": ((66,), (66,)),
    "neighbors": ((31, 32, 33), (0, 1)),
    "counts-differ": ((0, 20, 40, 66), (5,)),
    "one-row-only": ((), (7, 50)),
    "seventeen": (tuple(range(0, 51, 3)), (2, 3)),
    "all": (EVERY, EVERY),
    "all-of-one-row": (EVERY, (3,)),
}

HALO_CASES = {
    "halo": AttentionCase(globals_per_row=((0, 20, 21, 60), (5,)), halo=(20, 15)),
    "tiles-of-halo": AttentionCase(
        seqlen=300, heads=1, window_size=30, globals_per_row=((0, 290), (150,)), halo=(150, 100)
    ),
    "nothing-but-halo": AttentionCase(globals_per_row=((3,), ()), halo=(60, 60), dropout_p=0.3),
    "halo-and-holes": AttentionCase(
        globals_per_row=((0, 30), (5, 66)),
        padding="holes",
        halo=(20, 15),
        dropout_p=0.3,
        position_offset=1000,
    ),
    "packed-halo": AttentionCase(
        globals_per_row=((0, 30), (5,)), packed=True, halo=(20, 15), dropout_p=0.3, position_offset=64
    ),
    "before-the-start": AttentionCase(
        globals_per_row=((20, 30), (5, 66)), padding="left", dropout_p=0.3, position_offset=-16
    ),
    "many-globals": AttentionCase(
        globals_per_row=(tuple(range(0, 60, 3)), (1, 2)), halo=(9, 9), dropout_p=0.3, position_offset=2**30
    ),
}


def in_turns(values: Iterable, *others: Iterable) -> list[tuple]:
    """Returns each of the values with one of each of the others, which take turns."""
    turns = [itertools.islice(itertools.cycle(other), i, None) for i, other in enumerate(others)]
    return list(zip(values, *turns, strict=False))


def at_seqlen(base: AttentionCase, seqlen: int, **changes) -> AttentionCase:
    """Returns ``base`` with three global tokens in the first sequence and one in the second."""
    globals_per_row = ((0, seqlen // 2, seqlen - 1), (seqlen // 3,))
    return replace(base, seqlen=seqlen, globals_per_row=globals_per_row, **changes)


def name_of(value: object) -> str:
    """Names a test's parameter."""
    return str(value).removeprefix("torch.").replace(" ", "")
