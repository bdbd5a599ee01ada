"""The benchmarks run, tell a wrong result from a right one, and lose nothing that they measured."""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.harness import memory, runner, table, verify
from benchmarks.harness.cases import MemoryCase
from benchmarks.harness.shapes import SMOKE, Shape, attention_pairs
from benchmarks.report import plot, summary
from benchmarks.suites import attention_providers as providers
from benchmarks.suites import attention_truth, catalog, generation
from benchmarks.suites.attention_truth import LEAVES, make_inputs, truth_of
from led_kernels import banded_attention, longformer_attention

ROOT = Path(__file__).parents[2]
TORCH_ONLY = ["attention", "--smoke", "--only", f"attention_{SMOKE.seqlen}, banded {providers.TORCH}"]


@pytest.fixture(scope="module")
def smoke_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "smoke.csv"
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--repeats", "2", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| encoder (led_model) vs transformers |" in result.stdout
    return out


def test_smoke_run_writes_every_case(smoke_csv: Path) -> None:
    rows = table.read(smoke_csv)
    assert {row.what for row in rows} == {"mm", "copy", "banded", "core", "linears", "encoder", "memory"}
    assert {row.seqlen for row in rows if row.what == "core"} == {SMOKE.seqlen, 4 * SMOKE.seqlen}
    assert {row.provider for row in rows if row.what == "memory"} >= {"led_model", "transformers"}
    for row in rows:
        assert row.peak_mib > 0 if row.what == "memory" else 0 < row.min_ms <= row.median_ms
        assert row.repeats == (0 if row.what == "memory" else 2)
        assert row.error <= verify.TOLERANCE
    assert not smoke_csv.with_suffix(".csv.partial").exists()


def test_plots_come_from_the_csv_alone(smoke_csv: Path, tmp_path: Path) -> None:
    assert plot.main([str(smoke_csv), "--out", str(tmp_path)]) == 0
    names = {"pattern.png", "memory.png", "learning.png", "efficiency.png", "speedup.png", "encoder.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_summary_prints_figures_and_floors(smoke_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(smoke_csv)]) == 0
    printed = capsys.readouterr().out
    assert "operations ÷ torch.mm's rate" in printed
    assert "encoder (led_model), peak memory ÷ transformers'" in printed


def test_figures_are_computed_from_rows_of_one_group() -> None:
    def row(group: str, what: str, provider: str, **values: float) -> table.Row:
        return table.Row(group, what, provider, "forward", 4096, 12, 64, 512, 1, **values)

    rows = [
        row("attention_4096", "mm", "torch.mm", median_ms=10, flop=1000),
        row("attention_16384", "mm", "torch.mm", median_ms=1, flop=1000),
        row("attention_4096", "banded", providers.CPU, median_ms=5, flop=400),
        row("attention_4096", "banded", providers.FLEX, median_ms=10, flop=400),
    ]
    seen = {figure.name: (figure.seen, figure.is_met) for figure in summary.figures(rows)}
    assert seen == {
        "forward, FLOP/s ÷ `torch.mm`'s": (0.8, True),
        "forward vs `torch.compile(flex_attention)`": (2.0, True),
    }


def test_figures_of_generation() -> None:
    def row(what: str, provider: str, direction: str, **values: float) -> table.Row:
        return table.Row("generation_4096", what, provider, direction, 4096, 12, 64, 512, 1, **values)

    rows = [
        row("read", "torch.sum", "forward", median_ms=20),
        row("step", "led_model", generation.GREEDY, median_ms=25),
        row("greedy", "led_model", "generate", median_ms=100),
        row("greedy", "transformers", "generate", median_ms=150),
        row("memory", "led_model", "forward", peak_mib=10),
        row("memory", "transformers", "forward", peak_mib=40),
    ]
    seen = [(figure.seen, figure.is_met) for figure in summary.figures(rows)]
    assert seen == [(1.5, False), (1.25, True), (0.25, True)]
    assert summary.floors(rows).splitlines()[1].split() == ["greedy", "20.00", "25.00"]
    assert summary.report([row for row in rows if row.what == "step"]), "--only step"


@pytest.mark.slow
def test_smoke_run_of_generation(tmp_path: Path) -> None:
    out = tmp_path / "smoke.csv"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "generation",
        "--smoke",
        "--repeats",
        "2",
        "--out",
        str(out),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {row.what for row in table.read(out)} == {"read", "step", "greedy", "4 beams", "memory"}
    assert "| 4 beams (led_model) vs transformers |" in result.stdout


def test_readme_block_is_replaced_between_its_marks() -> None:
    begin, end = summary.marks(summary.FIGURES)
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert summary.update_readme(text, "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="marks"):
        summary.update_readme("no marks", "new")


@pytest.mark.parametrize(("seqlen", "window"), [(40, 7), (12, 30), (9, 0)])
def test_pairs_are_those_of_the_dense_mask(seqlen: int, window: int) -> None:
    position, globals_ = torch.arange(seqlen), torch.tensor([0, 5])
    allowed = ((position[:, None] - position).abs() <= window) | torch.isin(position, globals_)
    allowed[globals_] = False
    assert attention_pairs(Shape(seqlen=seqlen, window=window, global_index=(0, 5))) == int(allowed.sum())


@pytest.mark.parametrize("what", ["banded", "core"])
def test_truth_agrees_with_the_fp64_reference(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_truth, "BLOCK", 50)
    shape = replace(SMOKE, seqlen=130, window=20, global_index=(3, 77))
    inputs = make_inputs(shape)
    function = {"banded": banded_attention, "core": longformer_attention}[what]
    provider = providers.led_kernels_provider(function, "reference")
    result = providers.forward_backward(provider, inputs, LEAVES[what])()
    assert verify.check(what, result, truth_of(what, shape)) < 1e-5


def test_wrong_result_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_with_one_key_too_few(inputs: attention_truth.Inputs) -> providers.Attend:
        return right.build(replace(inputs, shape=replace(inputs.shape, window=inputs.shape.window - 1)))

    right = providers.BANDED[providers.TORCH]
    monkeypatch.setitem(providers.BANDED, providers.TORCH, replace(right, build=build_with_one_key_too_few))
    out = tmp_path / "out.csv"
    assert benchmarks.main([*TORCH_ONLY, "--out", str(out)]) == 1
    assert "led_kernels torch, forward: out is off" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing was timed


def test_nan_and_missing_rows_are_red() -> None:
    truth = {"out": torch.ones(2, 3, dtype=torch.float64)}
    assert verify.check("same", {"out": torch.ones(2, 3)}, truth) == 0
    for wrong in (torch.full((2, 3), float("nan")), torch.zeros(2, 3), torch.ones(2, 2)):
        with pytest.raises(verify.GateError):
            verify.check("wrong", {"out": wrong}, truth)


def test_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([0.1] * 6)

    def time_some(call: object) -> float:
        try:
            return next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(runner, "_time", time_some)
    out = tmp_path / "out.csv"
    assert benchmarks.main([*TORCH_ONLY, "--repeats", "4", "--out", str(out)]) == 130
    rows = table.read(out.with_suffix(".csv.partial"))
    assert not out.exists()
    # mm, copy, forward, forward+backward took their first turn, and two of them a second one
    assert [row.repeats for row in rows] == [2, 2, 1, 1]


def test_slow_case_gets_fewer_turns_spread_evenly() -> None:
    turns = [turn for turn in range(15) if runner._is_turn(turn, 4, 15)]
    assert turns[0] == 0
    assert len(turns) == 4
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 4


def test_only_refuses_what_names_no_case(tmp_path: Path) -> None:
    assert benchmarks.main(["--smoke", "--only", "nothing like it", "--out", str(tmp_path / "out.csv")]) == 2


def test_help_lists_the_suites_and_what_else_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        benchmarks.main(["--help"])
    printed = capsys.readouterr().out
    for suite in (*catalog.SUITES, "quantization"):
        assert f"\n  {suite} " in printed
    for module in benchmarks.OTHERS:
        assert f"python -m {module} " in printed
        assert importlib.util.find_spec(module)


def test_quantization_refuses_the_options_of_timings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main(["quantization", "--smoke", "--repeats", "3"])
    assert "neither --only nor --repeats" in capsys.readouterr().err


def allocations(shape: Shape) -> tuple[Callable[[], object], Callable[[], object]]:
    return lambda: torch.ones(2**18), lambda: torch.ones(2**18 * shape.seqlen)


def test_peak_memory_is_that_of_the_second_call() -> None:
    peak = memory.measure(MemoryCase("torch", allocations), Shape(seqlen=100), threads=1)
    assert peak == pytest.approx(100, abs=5)
