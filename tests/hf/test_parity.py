"""Every output and gradient of fused models equals transformers', over windows, heads, masks and globals."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

from hf_cases import BUILDERS, HFCase, assert_parity

CASES = {
    "plain": HFCase(),
    "one-global": HFCase(globals_per_row=((0,), (0,))),
    "counts-differ": HFCase(globals_per_row=((0, 9, 18), (3,))),
    "row-without-globals": HFCase(globals_per_row=((), (2, 5))),
    "all-global": HFCase(globals_per_row=(tuple(range(19)), (0,))),
    "right-padding": HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right")),
    "left-padding": HFCase(globals_per_row=((15, 16), (18,)), padding=("left", "left")),
    "holes": HFCase(globals_per_row=((0, 7, 8), (17,)), padding=("holes", "holes")),
    "row-of-padding": HFCase(globals_per_row=((0, 7), (3,)), padding=("none", "all")),
    "only-padding": HFCase(padding=("all", "all")),
    "windows-differ": HFCase(windows=(4, 16, 8), globals_per_row=((0,), (1, 10))),
    "window-wider-than-input": HFCase(windows=(64,), seqlen=11, globals_per_row=((0,), (10,))),
    "one-token": HFCase(seqlen=1, globals_per_row=((0,), ())),
    "one-head": HFCase(heads=1, head_dim=6, globals_per_row=((0, 3), (4,))),
    "longer-than-a-block": HFCase(
        windows=(16,),
        seqlen=300,
        positions=304,
        globals_per_row=((0, 299), (150,)),
        padding=("none", "holes"),
    ),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_output_and_gradient(case, build):
    assert_parity(case, build(case))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed, build):
    case = HFCase.draw(seed)
    assert_parity(case, build(case))


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
@pytest.mark.parametrize("first", range(100, 300, 20))
def test_many_random_models(first, build):
    for seed in range(first, first + 20):
        case = HFCase.draw(seed)
        assert_parity(case, build(case))
