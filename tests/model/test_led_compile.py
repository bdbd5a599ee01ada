"""torch.compile: the whole encoder, for documents of any length, and one step of the decoder."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from led_model.generation import step as decoder_step
from tests.model.small import random_inputs

LENGTHS = (50, 60, 33, 96)


@pytest.fixture
def graphs_made():
    """A function: how many graphs were compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def inputs_of(length: int) -> dict[str, torch.Tensor]:
    inputs = random_inputs(length, batch=2, seqlen=length)
    del inputs["decoder_input_ids"]
    return inputs


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_encoder_compiles_whole_and_not_for_each_length(
    small_model, graphs_made, dynamic, graphs, with_gradients
):
    model = small_model(0, encoder_layers=1, attention_window=8)
    compiled = torch.compile(model.led.encode, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = [p for name, p in model.led.encoder.named_parameters() if "key_global.bias" not in name]
    for length in LENGTHS:
        inputs = inputs_of(length)
        with torch.set_grad_enabled(with_gradients):
            expected, actual = (encode(**inputs, max_globals=8) for encode in (model.led.encode, compiled))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        if with_gradients:
            d_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(length))
            grads = [torch.autograd.grad(out, parameters, d_out) for out in (actual, expected)]
            for of_compiled, of_eager in zip(*grads, strict=True):
                scale = of_eager.abs().max().item()
                torch.testing.assert_close(of_compiled, of_eager, atol=1e-4 * scale, rtol=1e-3)
    assert graphs_made() == graphs


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_one_step_serves_all_tokens_of_documents_of_any_length(small_model, graphs_made, monkeypatch, beams):
    model = small_model(0)
    step = torch.compile(decoder_step._step, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(decoder_step, "_compiled_step", lambda device_type: step)
    for graphs, length in zip((1, 2, 2, 2), LENGTHS, strict=False):
        inputs = inputs_of(length)
        settings = {"num_beams": beams, "max_new_tokens": 12, "eos_token_id": None}
        compiled = model.generate(**inputs, **settings, compiled=True)
        assert graphs_made() == graphs
        assert torch.equal(compiled, model.generate(**inputs, **settings))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_to_machine_code(small_model):
    model, inputs = small_model(0), inputs_of(50)
    torch._dynamo.reset()
    compiled = model.generate(**inputs, max_new_tokens=12, compiled=True)
    assert torch.equal(compiled, model.generate(**inputs, max_new_tokens=12))
