"""Ranks that share the heads of a model compute what one device does: losses, every gradient, tokens and operators."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

from tests.distributed.processes import result, run_on_ranks
from tests.distributed.tensor_parallel_cases import BEAMS, GLOBALS, MODELS, OPERATORS

pytestmark = pytest.mark.slow

CASES = "tests.distributed.tensor_parallel_cases"
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Returns what each of four ranks found."""
    return run_on_ranks(4, f"{CASES}.on_four_ranks", tmp_path_factory.mktemp("ranks"))


def assert_all_within(found: list[dict[str, Any]], check: str, limit: float) -> None:
    for rank in found:
        assert result(rank, check) <= limit


def assert_all_true(found: list[dict[str, Any]], check: str) -> None:
    for rank in found:
        assert result(rank, check) is True


def assert_refused(found: list[dict[str, Any]], check: str, *words: str) -> None:
    for rank in found:
        error = result(rank, check)["error"]
        assert all(word in error for word in words), error


@every_model
@pytest.mark.parametrize("kind", GLOBALS)
def test_loss_and_gradients(kind, name, found):
    assert_all_within(found, f"step {name} {kind}", 1e-11)


@every_model
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_in_fp32(ranks, name, found):
    assert_all_within(found, f"step {name} fp32 {ranks}", 1e-6)


@every_model
def test_error_bound_in_fp32(name, found):
    """With wider weights one process alone rounds by more than 1e-6."""
    assert_all_true(found, f"step {name} fp32")


@every_model
def test_gradient_checkpointing(name, found):
    assert_all_within(found, f"step {name} checkpointing", 1e-11)


@every_model
@pytest.mark.parametrize("kind", BEAMS)
def test_tokens(kind, name, found):
    assert_all_true(found, f"tokens {name} {kind}")


def test_tokens_with_a_static_cache_of_transformers(found):
    assert_all_true(found, "tokens drop-in static")


@every_model
def test_state_dicts_with_whole_tensors(name, found):
    assert_all_true(found, f"state dicts {name}")


@every_model
@pytest.mark.parametrize("kind", ["parallelize", "fully_shard"])
def test_one_rank_saves_what_all_gathered(kind, name, found):
    assert_all_true(found, f"saved {name} {kind}")


def test_saving_shards_is_refused(found):
    assert_refused(found, "saved in shards", "is sharded over several processes", "full_state_dict(model)")


@every_model
def test_weights_are_those_of_the_first_rank(name, found):
    assert_all_true(found, f"first rank {name}")


@every_model
def test_clipped_gradients(name, found):
    assert_all_within(found, f"clipped {name}", 1e-11)


@every_model
def test_dropout_is_the_same_on_all_ranks(name, found):
    assert_all_true(found, f"dropout {name}")


@every_model
def test_attentions_are_those_of_the_ranks_heads(name, found):
    assert_all_within(found, f"attentions {name}", 1e-12)


def test_longformer(found):
    assert_all_within(found, "longformer", 1e-11)


@pytest.mark.parametrize(("operator", "where", "is_packed"), OPERATORS)
def test_operators_take_dtensors(operator, where, is_packed, found):
    assert_all_within(found, f"operator {operator} {where} {is_packed}", 1e-12)


def test_dropout_of_a_sharded_dtensor_is_refused(found):
    assert_refused(found, "operator dropout", "dropout_p is 0.5", "to_local")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("stock", ("tensor_parallel_plan", "apply_led_kernels")),
        ("twice", ("sharded over heads already", "once")),
        ("adapter", ("decoder.layers.1.fc2 is a Adapter", "plain nn.Linear")),
        ("sharded", ("is sharded already", "before fully_shard")),
        ("feed-forward", ("25 output features", "2 ranks")),
    ],
)
def test_refusals(what, words, found):
    assert_refused(found, f"refuses {what}", *words)


@every_model
def test_loss_and_gradients_on_four_ranks(name, found):
    assert_all_within(found, f"step {name} four", 1e-11)


@every_model
def test_fsdp_over_the_other_dimension(name, found):
    assert_all_within(found, f"fsdp {name}", 1e-11)


@every_model
def test_ddp_over_the_other_dimension(name, found):
    assert_all_within(found, f"ddp {name}", 1e-11)


@every_model
def test_tokens_of_a_model_sharded_twice(name, found):
    assert_all_true(found, f"tokens {name} fsdp")


def test_heads_that_ranks_do_not_divide_are_refused(found):
    assert_refused(found, "refuses heads", "decoder.layers.0.self_attn has 2 heads", "4 ranks")


def test_a_mesh_of_two_dimensions_is_refused(found):
    assert_refused(found, "refuses mesh", "2 dimensions", 'mesh["tp"]')


def test_importing_imports_no_dtensors():
    code = "import sys, led_kernels; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
