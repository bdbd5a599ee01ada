"""Hooks and tracers see what a module computes: every call, whole, and not overwritten afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.model.small import VOCAB_SIZE, random_inputs


@pytest.fixture
def model(small_model):
    return small_model(0, activation_function="gelu", max_encoder_position_embeddings=3000)


def seen_by(run, register) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Returns by module every output that a hook saw: kept as it was handed over, and copied at that time."""
    seen: dict[str, list] = {}

    def hook(module, inputs, output):
        if isinstance(output, torch.Tensor):
            seen.setdefault(module, []).append((output, output.detach().clone()))

    handles = register(hook)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def everywhere(hook):
    return [nn.modules.module.register_module_forward_hook(hook)]


@pytest.mark.parametrize("seqlen", [9, 1500])  # by the kernels for few rows, and in pieces
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("where", ["each module", "all modules"])
def test_hooks_see_outputs_that_stay_as_they_are(model, where, grad, seqlen):
    inputs = random_inputs(0, batch=1, seqlen=seqlen)
    run = lambda: model(**inputs).logits  # noqa: E731
    register = (
        everywhere
        if where == "all modules"
        else lambda hook: [m.register_forward_hook(hook) for m in model.modules()]
    )
    with torch.set_grad_enabled(grad):
        expected = run()
        seen = seen_by(run, register)
        torch.testing.assert_close(run(), expected)
    for calls in seen.values():
        assert all(torch.equal(kept, copied) for kept, copied in calls)
    uncalled = (model.led, model.led.shared)  # whose weight the embeddings of both stacks read
    called = [m for m in model.led.modules() if not isinstance(m, nn.ModuleList) and m not in uncalled]
    missing = [name for name, m in model.named_modules() if m in called and m not in seen]
    assert missing == []
    fc1 = model.led.encoder.layers[0].fc1
    assert [kept.shape[-2] for kept, _ in seen[fc1]] == [seqlen]


def test_a_hook_may_ask_for_the_gradient_of_what_it_sees(model):
    kept = []

    def hook(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    model.led.encoder.layers[0].fc2.register_forward_hook(hook)
    model(**random_inputs(0)).logits.sum().backward()
    assert kept[0].grad is not None
    assert kept[0].grad.abs().max() > 0


@pytest.mark.parametrize("seqlen", [9, 37])
@pytest.mark.parametrize("how", ["jit", "make_fx", "make_fx fake"])
def test_traced_models_compute_with_their_inputs(model, how, seqlen):
    first, second = (random_inputs(seed, batch=1, seqlen=seqlen) for seed in (0, 1))

    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, decoder_input_ids):
            return self.model(
                input_ids,
                torch.ones_like(input_ids),
                global_attention_mask=torch.zeros_like(input_ids).index_fill(1, torch.tensor([0]), 1),
                decoder_input_ids=decoder_input_ids,
                max_globals=1,
            ).logits

    forward = Forward()

    def inputs(given):
        return given["input_ids"], given["decoder_input_ids"]

    with torch.no_grad():
        expected = forward(*inputs(second))
        if how == "jit":
            traced = torch.jit.trace(forward, inputs(first), check_trace=False)
        else:
            mode = "fake" if how.endswith("fake") else "real"
            traced = make_fx(forward, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs(first))
        for _ in range(2):
            torch.testing.assert_close(traced(*inputs(second)), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape[-1] == VOCAB_SIZE


@pytest.mark.parametrize("how", ["jit", "real", "fake", "symbolic"])
def test_what_cannot_be_traced_is_told(model, how):
    """A program would hold the first document's number of global tokens, and end where its text ended."""
    inputs = random_inputs(0, batch=1)
    ids = inputs["input_ids"]

    def trace(function):
        if how == "jit":
            return torch.jit.trace(function, ids, check_trace=False)
        return make_fx(function, tracing_mode=how, _allow_non_fake_inputs=True)(ids)

    for parameter in model.parameters():  # jit takes them for constants
        parameter.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"global tokens is looked at, and cannot be traced; give max_globals"
    ):
        trace(lambda ids: model(ids, global_attention_mask=inputs["global_attention_mask"]).logits)
    with pytest.raises(ValueError, match=r"^generate looks at its tokens .* trace the model's forward"):
        trace(lambda ids: model.generate(ids, max_new_tokens=4))
    others = random_inputs(1, batch=1)["input_ids"]  # without masks there are no global tokens
    torch.testing.assert_close(
        trace(lambda ids: model(ids).logits)(others), model(others).logits, atol=1e-4, rtol=1e-4
    )
