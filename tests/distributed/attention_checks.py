"""Ranks compute longformer attention of sequences that are split over them, and each compares with the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from led_kernels.distributed.context import ContextParallelMask
from led_kernels.distributed.split_attention import context_parallel_attention
from led_kernels.testing import AttentionCase, attention_function, poisoned_memory, run_with_gradients
from tests.distributed.processes import run_checks

BASE = AttentionCase(seqlen=120, globals_per_row=((0, 5, 61), (0, 31, 32, 119)), padding="holes")
NAMES = ("q", "k", "v", "q_global", "k_global", "v_global")
CASES: dict[str, AttentionCase] = {
    "strips": BASE,
    "no-strips": replace(BASE, window_size=30),
    "over-several-parts": replace(BASE, window_size=75),
    "unlimited": replace(BASE, window_size=-1),
    "no-window": replace(BASE, window_size=0),
    "left-only": replace(BASE, window_size=(9, 0)),
    "right-only": replace(BASE, window_size=(0, 9)),
    "uneven-window": replace(BASE, window_size=(3, 14)),
    "odd-seqlen": replace(BASE, seqlen=121),
    "shortest": replace(BASE, seqlen=13, globals_per_row=((0, 12), (5,)), window_size=2),
    "no-globals": replace(BASE, globals_per_row=()),
    "all-global": replace(BASE, seqlen=37, globals_per_row=(tuple(range(37)), (3,)), padding="none"),
    "one-row-has-globals": replace(BASE, globals_per_row=((), (7, 90))),
    "padding-right": replace(BASE, padding="right", batch=3),  # some parts are padding alone
    "padding-left": replace(BASE, padding="left"),
    "all-padding": replace(BASE, padding="all", globals_per_row=((0, 70), ())),
    "one-row": replace(BASE, batch=1, globals_per_row=((0, 64),), padding="none"),
    "dropout": replace(BASE, dropout_p=0.3),
    "dropout-no-strips": replace(BASE, dropout_p=0.3, window_size=(41, 30), padding="right"),
    "scale": replace(BASE, softmax_scale=0.3),
}
UNEVEN = {
    2: {"short-first": (0, 4, 120), "short-last": (0, 116, 120)},
    4: {"short-first": (0, 4, 8, 80, 120), "short-middle": (0, 60, 64, 68, 120)},
}
BACKENDS = ("cpu", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def names(world: int) -> list[str]:
    """Returns the names of all checks with so many ranks."""
    return list(_checks(world))


def main() -> dict[str, Any]:
    return run_checks(_checks(dist.get_world_size()))


def _checks(world: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for (name, case), backend in itertools.product(CASES.items(), BACKENDS):
        found[f"{name} {backend} float64"] = partial(compare, case, backend, torch.float64)
    for dtype in DTYPES[1:]:
        for backend in BACKENDS:
            label = str(dtype).removeprefix("torch.")
            found[f"strips {backend} {label}"] = partial(compare, BASE, backend, dtype)
    for name, bounds in UNEVEN[world].items():
        found[f"{name} cpu float64"] = partial(compare, BASE, "cpu", torch.float64, bounds)
    return found


def compare(
    case: AttentionCase, backend: str, dtype: torch.dtype, bounds: tuple[int, ...] = ()
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns by name this rank's rows: as computed in parts, of the oracle, and of plain PyTorch in one process."""
    whole = case.mask()
    mask = ContextParallelMask(whole, dist.group.WORLD, bounds)
    inputs = [x for seed in range(2) for x in case.inputs(whole, dtype, seed)]
    expected = []
    for run_dtype in (torch.float64, dtype):
        function = attention_function("longformer", case, whole, "reference")
        results = run_with_gradients(
            function, [x.to(run_dtype) for x in inputs], grad_dtype=dtype, names=NAMES
        )
        expected.append({name: x[:, mask.own] for name, x in results.items()})

    def in_parts(*parts: Tensor) -> tuple[Tensor, None]:
        with poisoned_memory():
            out = context_parallel_attention(
                *parts, mask, window_size=case.window_size, softmax_scale=case.softmax_scale,
                dropout_p=case.dropout_p, backend=backend,
            )  # fmt: skip
        # run_with_gradients draws d_out for the result's shape: this is the whole of it, with zeros elsewhere.
        before, after = mask.own.start, whole.max_seqlen - mask.own.stop
        return torch.nn.functional.pad(out, (0, 0, 0, 0, before, after)), None

    # Ranks with other seeds drop what the first rank's says.
    actual = run_with_gradients(
        in_parts,
        [x[:, mask.own] for x in inputs],
        grad_dtype=dtype,
        names=NAMES,
        dropout_seed=0 if dist.get_rank() == 0 else 5,
    )
    actual["out"] = actual["out"][:, mask.own]
    return {name: (actual[name], *(x[name] for x in expected)) for name in actual}
