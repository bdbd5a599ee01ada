"""Tests of the tests: faults planted in the compiled kernels must not go unnoticed.

A mutant is caught when the interpreter raises or the results miss the error bound. Some mutants are the same program in
effect: a last wait that nothing in flight needs, a load that is off in all lanes, ``row > last`` for ``row >= last``
where a mask follows. So a share of each kind must be caught, somewhat less than was seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from led_kernels.testing import AttentionCase, assert_matches_reference
from tests.emulation.ptx.faults import PtxFault
from tests.emulation.ptx.launch import executed_launches
from tests.emulation.ptx.mutations import KINDS, Mutation, mutations, spread

SIZES = dict(heads=1, head_dim=64, seqlen=300)
CASES = (
    # tiles with padding and interior tiles; global tokens inside and outside of the bands
    AttentionCase(
        **SIZES, batch=1, window_size=(100, 90), padding="left", globals_per_row=((110, 120, 290),)
    ),
    # a full tile of global tokens, sequences that end elsewhere in a tile
    AttentionCase(
        **SIZES, batch=2, window_size=(60, 70), packed=True, globals_per_row=(tuple(range(3, 300, 19)), (5,))
    ),
)
OPS = {
    "_banded_forward_kernel": "banded",
    "_banded_dq_kernel": "banded",
    "_banded_dkdv_kernel": "banded",
    "_global_forward_kernel": "global",
    "_global_dq_kernel": "global",
}
EXPECTED_SHARE = {
    "compare": 0.5,
    "wait": 0.6,
    "operator": 0.6,
    "shared address": 0.8,
    "global address": 0.4,
    "barrier": 0.5,
}


def execute(kernel: str, edit_ptx: Callable[[str, str], str] | None = None) -> str:
    """Runs the kernel's op on the cases and checks the results -> its PTX as compiled"""
    for case in CASES:
        with executed_launches(edit_ptx) as launches:
            assert_matches_reference(OPS[kernel], case, "triton", dtype=torch.bfloat16)
    return next(x.kernel.asm["ptx"] for x in launches if x.name == kernel)


@functools.cache
def mutations_of(kernel: str) -> dict[str, list[Mutation]]:
    """Returns mutations by kind, in what the cases execute of the kernel."""
    ptx = execute(kernel)
    return {kind: mutations(ptx, kind) for kind in KINDS}


def is_caught(kernel: str, mutation: Mutation) -> bool:
    try:
        execute(kernel, lambda name, ptx: mutation.apply(ptx) if name == kernel else ptx)
    except (PtxFault, AssertionError):
        return True
    return False


def check(kernel: str, kind: str, count: int, expected_share: float) -> None:
    planted = spread(mutations_of(kernel)[kind], count)
    survivors = [mutation for mutation in planted if not is_caught(kernel, mutation)]
    assert planted, f"no {kind} in {kernel}"
    caught = len(planted) - len(survivors)
    print(f"{kernel}, {kind}: {caught} of {len(planted)} caught", *survivors, sep="\n  ")
    assert caught >= expected_share * len(planted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["_banded_forward_kernel", "_banded_dkdv_kernel"])
def test_planted_faults_are_caught(kernel, kind):
    # Of the compares many make no difference in these cases, so that two would say little.
    check(kernel, kind, count=4 if kind == "compare" else 2, expected_share=0.5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", OPS)
def test_most_planted_faults_are_caught(kernel, kind):
    check(kernel, kind, count=12, expected_share=EXPECTED_SHARE[kind])
