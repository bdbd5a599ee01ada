"""The GPU report without a GPU: what it would do, its files, and its timing code on the CPU at tiny shapes."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from benchmarks.harness import runner, table
from benchmarks.harness.cases import Group
from benchmarks.harness.shapes import SMOKE
from benchmarks.report import gpu_checks, gpu_report
from benchmarks.report.gpu_report import Report, Step
from benchmarks.suites import gpu_attention
from led_kernels.dispatch import BackendUnavailable

ROOT = Path(__file__).parents[2]
BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # starts sooner
SMALL = replace(SMOKE, window=64)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.md")


def small_groups(dtype: str = "float32") -> list[Group]:
    return gpu_attention.groups(["torch"], replace(SMALL, dtype=dtype), [256])[:1]


def window_groups() -> list[Group]:
    return gpu_attention.groups(["torch"], SMALL, [256])[1:]


def row(**values: object) -> table.Row:
    """Makes up a row, for the writer."""
    made_up = dict(
        group="g", what="banded", direction="forward", seqlen=1, heads=1, head_dim=1, window=1, num_globals=0
    )
    return table.Row(**(made_up | values))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        gpu_report.main(["--help"])
    assert "--dry-run" in capsys.readouterr().out


@without_gpu
def test_needs_a_gpu_and_says_so_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.report.gpu_report", "--out", str(tmp_path / "report.md")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--dry-run" in result.stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_every_step_and_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(gpu_attention.importlib.util, "find_spec", lambda name: None)
    assert gpu_report.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for path in (*gpu_checks.TESTS, gpu_checks.SANITIZED):
        if path.startswith("tests/"):
            assert (ROOT / path).exists()
    assert " ".join(gpu_checks.TESTS[-4:]) in printed
    for step in ("memcheck, triton", "racecheck, triton", "memcheck, cuda", "racecheck, cuda"):
        assert f"compute-sanitizer {step}: left out, compute-sanitizer is neither on PATH" in printed
    for group in gpu_attention.groups():
        assert f"{group.name}: 12 heads, head_dim 64, window ±512" in printed
    for seqlen in (1024, 4096, 16384):
        assert f"attention_{seqlen}" in printed
    assert "  core, transformers, forward+backward: left out, transformers is not installed." in printed
    assert "  banded, flash-attn window, forward: left out, flash-attn is not installed." in printed
    for backend in ("triton", "cuda"):
        assert f"  banded, led_kernels {backend}, forward+backward\n" in printed or torch.cuda.is_available()
    assert " ms" not in printed


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a program of compute-sanitizer's name into a CUDA toolkit."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


@without_gpu
@pytest.mark.parametrize("backend", gpu_attention.BACKENDS)
@pytest.mark.parametrize("tool", gpu_checks.TOOLS)
def test_dry_run_shows_the_sanitizers_command(tool: str, backend: str, sanitizer: Path) -> None:
    printed = gpu_report.describe(gpu_report.steps([]))
    command = f"{sanitizer} --tool {tool} --target-processes all python -m pytest --gpu"
    (line,) = (line for line in printed.splitlines() if command in line and f"-k {backend}" in line)
    assert line.endswith("tests/gpu/test_every_kernel.py")


def test_sanitizer_of_a_backend_that_cannot_run_says_why(
    sanitizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def can_run(backend: str, device: torch.device, raise_error: bool) -> bool:
        if backend == "cuda":
            raise BackendUnavailable("built without it.")
        return True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "can_run", can_run)
    refusals = {step.title: step.refusal for step in gpu_report.steps([]) if "sanitizer" in step.title}
    for tool in gpu_checks.TOOLS:
        assert refusals[f"compute-sanitizer {tool}, cuda"] == "built without it."
        assert not refusals[f"compute-sanitizer {tool}, triton"]


def test_checks_leave_a_quarter_of_the_time_for_the_timings(sanitizer: Path) -> None:
    *checks, timings = gpu_report.steps([])
    assert timings.title == "Timings"
    assert sum(step.share for step in checks) <= 0.75


@pytest.mark.parametrize("backend", gpu_attention.BACKENDS)
def test_sanitized_tests_are_those_of_one_backend(backend: str) -> None:
    command = [part for part in gpu_checks.sanitized_tests(backend) if part not in ("--gpu", "-v")]
    result = subprocess.run([*command, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True)
    found = [line for line in result.stdout.splitlines() if line.startswith(gpu_checks.SANITIZED)]
    assert found, result.stdout
    assert all(line.endswith(f"-{backend}]") for line in found)


def test_a_gpu_without_bf16_is_timed_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert {group.shape.dtype for group in gpu_attention.groups()} == {dtype}


def test_the_selection_holds_tests_that_need_a_gpu() -> None:
    """Collected here, and skipped with the reason."""
    command = [sys.executable, "-m", "pytest", "-q", *gpu_checks.SELECTION, "tests/gpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    if not torch.cuda.is_available():
        assert "needs a GPU; run pytest --gpu on a machine that has one" in result.stdout


def test_markdown_has_times_relative_to_our_best() -> None:
    rows = [
        row(what="mm", provider="torch.mm", median_ms=2.0, min_ms=1.0, flop=4 * 10**9),
        row(provider="led_kernels triton", median_ms=2.0, min_ms=1.5, repeats=30, flop=10**9, error=2e-3),
        row(provider="led_kernels cuda", median_ms=2.5, min_ms=2.0, repeats=30, flop=10**9, error=2e-3),
        row(provider="dense SDPA", median_ms=5.0, min_ms=4.0, repeats=3, flop=10**9, error=1e-2),
    ]
    text = gpu_report.rows_as_markdown(rows)
    assert "| mm | torch.mm | forward | 2.0000 | 1.0000 | 0 | 2.00 |  |  |" in text
    assert "| banded | led_kernels triton | forward | 2.0000 | 1.5000 | 30 | 0.50 | 1.00 | 2.0e-03 |" in text
    assert "| banded | led_kernels cuda | forward | 2.5000 | 2.0000 | 30 | 0.40 | 1.25 | 2.0e-03 |" in text
    assert "| banded | dense SDPA | forward | 5.0000 | 4.0000 | 3 | 0.20 | 2.50 | 1.0e-02 |" in text


def timings(groups: list[Group]) -> Step:
    return next(step for step in gpu_report.steps(groups) if step.title == "Timings")


def test_timings_on_the_cpu(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "REPEATS", 1)
    assert gpu_report.write_report([timings(small_groups())], report, 600.0) == 0
    rows = table.read(report.path.with_suffix(".csv"))
    assert {row.provider for row in rows} == {
        "torch.mm", "torch.copy", "led_kernels torch", "flex_attention", "dense SDPA", "transformers",
    }  # fmt: skip
    assert all(0 <= row.error < 1e-4 and row.dtype == "float32" and row.repeats == 1 for row in rows)
    assert "### attention_256" in report.path.read_text()
    assert not report.markdown.exists()
    assert not report.csv.exists()


def test_flash_attention_where_it_is_installed(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes its place."""

    def flash_attn_func(q, k, v, window_size):
        i = torch.arange(q.shape[1])
        allowed = (i[:, None] - i >= -window_size[1]) & (i[:, None] - i <= window_size[0])
        dense = torch.nn.functional.scaled_dot_product_attention
        return dense(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed).transpose(1, 2)

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    stand_in.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(gpu_report, "REPEATS", 1)
    assert gpu_report.write_report([timings(window_groups())], report, 600.0) == 0
    rows = table.read(report.path.with_suffix(".csv"))
    assert {row.provider for row in rows} == {"led_kernels torch", "flash-attn window"}
    assert {row.num_globals for row in rows} == {0}


def test_peer_that_is_wrong_is_left_out(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "_build_dense", lambda inputs: lambda q, k, v: v)
    monkeypatch.setattr(gpu_report, "REPEATS", 1)
    (group,) = small_groups("bfloat16")
    group = replace(group, cases=tuple(case for case in group.cases if "SDPA" in case.name or case.is_ours))
    assert gpu_report.write_report([timings([group])], report, 600.0) == 0
    text = report.path.read_text()
    assert (
        "- banded, dense SDPA, forward: left out, GateError: banded, dense SDPA, forward: out is off" in text
    )
    assert "| banded | dense SDPA" not in text
    assert "| banded | led_kernels torch | forward |" in text


@pytest.mark.parametrize("error", [ValueError("does not compile"), None])
def test_ours_that_fails_is_not_timed(
    error: Exception | None, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args, **settings):
        if error:
            raise error
        return args[2]

    monkeypatch.setattr(gpu_attention, "banded_attention", wrong)
    assert gpu_report.write_report([timings(small_groups())], report, 600.0) == 1
    text = report.path.read_text()
    assert "### attention_256: FAILED" in text
    assert ("does not compile" if error else "out is off by") in text
    assert not report.path.with_suffix(".csv").exists()


def test_interrupted_report_keeps_what_is_done(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_time", interrupting_after(3))
    build = gpu_report.steps([])[0]
    assert gpu_report.write_report([build, timings(window_groups())], report, 600.0) == 130
    assert "## Build" in report.markdown.read_text()
    # forward, forward+backward and forward again
    assert [row.repeats for row in table.read(report.csv)] == [2, 1]
    assert not report.path.exists()


def interrupting_after(count: int) -> Callable[[object], float]:
    times = iter([0.001] * count)

    def measure(call: object) -> float:
        for seconds in times:
            return seconds
        raise KeyboardInterrupt

    return measure


def test_groups_that_the_time_does_not_reach_are_named(report: Report) -> None:
    assert gpu_report.write_report([timings(small_groups())], report, -1.0) == 0
    assert "### attention_256\n\nLeft out: the time is used up." in report.path.read_text()


def test_step_that_is_left_out_says_why(report: Report) -> None:
    assert gpu_report.write_report([Step("Thing", (), None, refusal="It is not here.")], report, 1.0) == 0
    assert "## Thing: left out\n\nIt is not here." in report.path.read_text()


def pytest_on(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "test_given.py"
    path.write_text(text)
    return [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        str(path),
    ]


def test_tests_are_counted(tmp_path: Path) -> None:
    text = "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='no luck')\ndef test_b(): pass\n"
    outcome, lines = gpu_checks.run_pytest([*pytest_on(tmp_path, text), "-ra"], 60.0, environment=BARE)
    assert outcome.is_good
    assert "1 passed, 1 skipped of 2 selected; exit status 0." in outcome.text
    assert "no luck" in outcome.text
    assert any("test_a PASSED" in line for line in lines)


def test_failed_tests_are_shown(tmp_path: Path) -> None:
    outcome, _ = gpu_checks.run_pytest(
        pytest_on(tmp_path, "def test_a(): pass\ndef test_b(): assert 1 == 2\n"), 60.0, environment=BARE
    )
    assert not outcome.is_good
    assert "1 passed, 1 failed of 2 selected; exit status 1." in outcome.text
    assert "assert 1 == 2" in outcome.text


def test_nothing_run_is_no_success(tmp_path: Path) -> None:
    assert not gpu_checks.run_pytest(pytest_on(tmp_path, ""), 60.0)[0].is_good
    assert not gpu_checks.run_pytest([sys.executable, "-c", "raise SystemExit(3)"], 60.0)[0].is_good


def test_time_limit_interrupts_the_tests(tmp_path: Path) -> None:
    text = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n"
    outcome, _ = gpu_checks.run_pytest(pytest_on(tmp_path, text), 8.0, environment=BARE)
    assert outcome.is_good
    assert "1 passed of 2 selected" in outcome.text
    assert "Stopped after the 8 s that it is given." in outcome.text


@pytest.mark.parametrize(
    ("summary", "is_good"),
    [
        ("ERROR SUMMARY: 0 errors", True),
        ("RACECHECK SUMMARY: 0 hazards displayed", True),
        ("ERROR SUMMARY: 2 errors", False),
    ],
)
def test_sanitizer_must_find_nothing(tmp_path: Path, summary: str, is_good: bool) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import subprocess, sys\nstatus = subprocess.run(sys.argv[1:]).returncode\n"
        f"print('========= {summary}')\nraise SystemExit(status)\n"
    )
    command = [sys.executable, str(tool), *pytest_on(tmp_path, "def test_a(): pass\n")]
    outcome = gpu_checks.run_sanitizer("memcheck", command, 60.0)
    assert outcome.is_good == is_good
    assert summary in outcome.text


def test_gpu_timer_measures_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for events and the buffer: what is recorded in which order."""
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, other: object) -> float:
            return 1500.0

    class Buffer:
        def zero_(self) -> None:
            order.append("write")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(runner, "_buffer_beyond_cache", Buffer)
    assert runner._time_on_gpu(lambda: order.append("call")) == 1.5
    assert order == ["write"] * runner.WRITES + ["event", "call", "event", "wait"]
