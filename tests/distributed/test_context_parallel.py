"""Models whose documents are split over ranks train and generate as one process does, beside DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch

from tests.distributed.context_checks import HEADS, MODELS, WRAPPERS
from tests.distributed.processes import result, run_on_ranks

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Returns what each of four ranks has found."""
    return run_on_ranks(4, "tests.distributed.context_checks.main", tmp_path_factory.mktemp("ranks"))


def assert_close(found: list[dict[str, Any]], check: str, limit: float = 1e-12) -> None:
    for rank, of_rank in enumerate(found):
        for name, difference in result(of_rank, check).items():
            assert difference <= limit, f"{name} on rank {rank}"


@every_model
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients(name, dtype, limit, found):
    assert_close(found, f"alone {name} {dtype}", limit)


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant, found):
    assert_close(found, f"checkpointing {name} {reentrant}")


@every_model
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_beside_data_parallelism(name, wrapper, found):
    assert_close(found, f"{wrapper} {name}")


@every_model
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sharded", [False, True], ids=["", "fsdp"])
def test_generation(name, beams, sharded, found):
    for of_rank in found:
        expected, actual = result(of_rank, f"generate {name} {beams} {sharded}")
        assert torch.equal(actual, expected)


@every_model
def test_tokens_that_are_drawn_are_the_same_on_all_ranks(name, found):
    first, *others = [result(of_rank, f"sampled {name}") for of_rank in found]
    assert all(torch.equal(other, first) for other in others)


@every_model
@pytest.mark.parametrize("what", ["frozen", "after a failure"])
def test_frozen_parameters_and_a_backward_that_follows_one_that_raised(what, name, found):
    assert_close(found, f"{what} {name}")


@every_model
def test_autocast(name, found):
    """A rank's loss is as near to that in fp32 as one process's."""
    for of_rank in found:
        plain, plain_bf16, split, split_bf16 = result(of_rank, f"autocast {name}")
        assert abs(split - plain) <= 1e-6 * plain
        assert abs(split_bf16 - plain) <= 2 * max(abs(plain_bf16 - plain), 2**-9 * plain)


@every_model
def test_gradients_of_embeddings_are_those_of_the_whole(name, found):
    for of_rank in found:
        expected, actual = result(of_rank, f"embeddings {name}")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_readmes_lines(found):
    for of_rank in found:
        expected, actual = result(of_rank, "readme")
        assert torch.equal(actual, expected)


@every_model
def test_dropout_of_the_decoder_is_the_same_on_all_ranks(name, found):
    first, *others = [result(of_rank, f"dropout {name}") for of_rank in found]
    assert first["losses"][0] != first["losses"][1]
    assert first["evaluated"] not in first["losses"]
    assert first["drawn"]  # so that the next step drops others
    for other in others:
        assert other == first


@every_model
def test_a_rank_has_its_rows_of_the_encoders_output(name, found):
    for of_rank in found:
        expected, actual = result(of_rank, f"rows {name}")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", HEADS)
def test_longformer_gathers_all_rows_for_its_head(name, found):
    assert_close(found, name)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("two dimensions", "mesh has 2 dimensions; give one of them"),
        ("no mesh", "give a torch DeviceMesh"),
        ("no encoder", "no encoder that can be split"),
        ("stock", "apply_led_kernels"),
        ("twice", "split over ranks already"),
        ("too short", "cannot be split over 4 ranks"),
        ("packed", "packed sequences"),
        ("compiled", "compiled is true"),
        *(
            (f"max_time{of}", "max_time is not served")
            for of in ("", " by position", " by name", " of the model")
        ),
        *((f"attentions {name}", "output_attentions") for name in MODELS),
        *((f"hidden states {name}", "output_hidden_states") for name in MODELS),
        *((f"layerdrop {name}", "encoder_layerdrop is 0.5") for name in MODELS),
    ],
)
def test_what_cannot_be_is_refused(what, words, found):
    for of_rank in found:
        message = of_rank[f"refused {what}"]
        assert message.startswith("refused: ")
        assert words in message
