"""Two processes train the drop-in and led_model as one trains transformers' own model, by DDP, FSDP2 and Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")

import torch
from training_cases import MODELS, assert_same_run, batch, difference, stock_model, trained, trainer_of
from two_processes import TRAINER_RUNS

SCRIPT = Path(__file__).with_name("two_processes.py")
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """Returns what two processes found that ``accelerate launch`` has started."""
    results = tmp_path_factory.mktemp("two-processes") / "results.pt"
    # accelerate starts several processes on a CPU by MPI alone, but asks for no GPU where it starts one for each.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", str(SCRIPT), str(results)]
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(results, weights_only=False)


def result(found: dict[str, Any], check: str) -> Any:
    value = found[check]
    assert not isinstance(value, str), f"{check}: {value}"
    return value


@every_model
@pytest.mark.parametrize("static_graph", [False, True], ids=["", "static-graph"])
@pytest.mark.parametrize("kind", ["all", "mixed", "none"])
def test_ddp_without_a_search_for_unused_parameters(kind, static_graph, name, found):
    assert difference(result(found, f"ddp {name} {kind} {static_graph}"), found[f"alone {kind}"]) <= 1e-6


@every_model
@pytest.mark.parametrize("by_layer", [False, True], ids=["root", "by-layer"])
@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_fsdp(kind, by_layer, name, found):
    assert difference(result(found, f"fsdp {name} {kind} {by_layer}"), found[f"alone {kind}"]) <= 1e-6


@every_model
@pytest.mark.parametrize("by_layer", [False, True], ids=["root", "by-layer"])
def test_fsdp_in_bf16(by_layer, name, found):
    before, after = dict(stock_model().named_parameters()), found["alone all"]
    ours = result(found, f"fsdp-bf16 {name} {by_layer}")
    moved = sum((after[name] - before[name]).square().sum().item() for name in after) ** 0.5
    apart = sum((after[name] - ours[name]).square().sum().item() for name in after) ** 0.5
    assert 0 < apart <= 0.05 * moved


@every_model
@pytest.mark.parametrize("by_layer", [False, True], ids=["root", "by-layer"])
def test_generate_of_a_sharded_model(by_layer, name, found):
    inputs = {name: x for name, x in batch(range(2)).items() if name not in ("labels", "decoder_input_ids")}
    stock, ours = stock_model(), result(found, f"generate {name} {by_layer}")

    def tokens() -> list[torch.Tensor]:
        return [stock.generate(**inputs, max_new_tokens=5, num_beams=beams) for beams in (1, 2)]

    assert all(map(torch.equal, ours["before"], tokens()))
    assert difference(ours["weights"], found["alone mixed"]) <= 1e-6
    stock.load_state_dict(found["alone mixed"], strict=False)
    assert all(map(torch.equal, ours["after"], tokens()))


@every_model
def test_generate_of_a_sharded_model_in_bf16(name, found):
    ours = result(found, f"generate-bf16 {name}")
    assert [tokens.shape for tokens in ours["before"]] == [(2, 6), (2, 6)]
    assert [tokens.shape for tokens in ours["after"]] == [(2, 6), (2, 6)]


@every_model
@pytest.mark.parametrize(("smoothing", "steps"), TRAINER_RUNS)
def test_trainer(steps, smoothing, name, found, tmp_path):
    expected = trained(trainer_of(stock_model(), tmp_path, label_smoothing_factor=smoothing))
    assert_same_run(result(found, f"trainer {name} {smoothing} {steps}"), expected, 2e-6)


@every_model
def test_trainer_that_counts_labels_by_process(name, found, tmp_path):
    expected = trained(trainer_of(stock_model(), tmp_path, equal=True))
    assert_same_run(result(found, f"trainer-apart {name}"), expected, 2e-6)
