"""Training gives the same gradients, under checkpointing, dropout and layerdrop, and with unused projections."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from hf_cases import BUILDERS, HFCase, assert_close, fused, led_model, longformer_model, true_fp64
from torch import Tensor, nn

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))


def gradients(model: nn.Module, inputs: dict[str, Tensor], **labels) -> dict[str, Tensor | None]:
    """Returns the loss under one seed of dropout, and every parameter's gradient."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs, **labels).loss
    loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **{name: g if g is None else g.clone() for name, g in named.items()}}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_gradient_checkpointing(build, reentrant):
    rates = {"led": {"attention_dropout": 0.2, "dropout": 0.1}}.get(
        build.__name__.removesuffix("_model"),
        {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1},
    )
    model = fused(build(CASE, **rates)).train()
    inputs = CASE.inputs()
    labels = inputs["input_ids"]
    expected = gradients(model, inputs, labels=labels)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = model.get_encoder().layers[0] if build is led_model else model.longformer.encoder.layer[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    attention = next(m for m in layer.modules() if type(m).__name__.endswith("SelfAttention"))
    attention.register_forward_hook(lambda *_: calls.append(2))
    assert_close(gradients(model, inputs, labels=labels), expected, 1e-5)
    assert calls.count(2) == 2  # once forward, once in the backward pass


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_unused_global_projections_have_no_gradient(build):
    stock = build(CASE)
    inputs = HFCase().inputs()
    labels = inputs["input_ids"]
    expected = gradients(stock, inputs, labels=labels)
    assert any(g is None for g in expected.values())
    assert_close(gradients(fused(stock), inputs, labels=labels), expected, 1e-4)
    # With a capacity all parameters take part: DistributedDataParallel waits for each of them
    ours = gradients(fused(stock, max_globals=1), inputs, labels=labels)
    assert not any(g is None for name, g in ours.items() if "_global" in name)


def test_layerdrop_draws_like_stock():
    # 24 tokens: transformers pads nothing, so that all dropout draws agree too
    case = HFCase(windows=(8,) * 6, seqlen=24, globals_per_row=((0,), (4,)))
    stock = led_model(
        case, encoder_layerdrop=0.5, decoder_layerdrop=0.5, decoder_layers=6, dropout=0.1
    ).train()
    inputs = case.inputs()
    expected = gradients(stock, inputs, labels=inputs["input_ids"])
    assert_close(gradients(fused(stock).train(), inputs, labels=inputs["input_ids"]), expected, 1e-4)


@pytest.mark.parametrize("name", ["led", "longformer"])
def test_attention_dropout_has_the_mean_and_variance_of_stock(name):
    case = HFCase(windows=(8,), seqlen=16, globals_per_row=((0, 5),), padding=("right",))
    if name == "led":
        stock = led_model(case, attention_dropout=0.3).get_encoder().layers[0].self_attn.longformer_self_attn
    else:
        model = longformer_model(case, attention_probs_dropout_prob=0.3)
        stock = model.longformer.encoder.layer[0].attention.self
    samples = 2000
    hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    merged = case.inputs()["attention_mask"] * (1 + case.inputs()["global_attention_mask"])
    mask = (merged - 1).expand(samples, -1).float()
    masks = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": True}
    torch.manual_seed(1)
    with torch.no_grad():
        ours = fused(stock)
        exact = ours(hidden, mask[:1])[0]
        draws = [
            module.train()(hidden.expand(samples, -1, -1), mask, **given)[0]
            for module, given in ((ours, {}), (stock, masks))
        ]
    (mean, variance), (stock_mean, stock_variance) = ((x.mean(0), x.var(0)) for x in draws)
    # They are means of `samples` draws: five standard errors are allowed.
    assert ((mean - exact[0]).abs() <= 5 * (variance / samples).sqrt() + 1e-6).all()
    assert ((mean - stock_mean).abs() <= 5 * ((variance + stock_variance) / samples).sqrt() + 1e-6).all()
    assert (variance.sum() / stock_variance.sum() - 1).abs() < 0.05
    padding = merged[0] == 0
    assert padding.any()
    assert not draws[0][:, padding].any()


def test_dropout_follows_the_seed():
    model = fused(longformer_model(CASE, attention_probs_dropout_prob=0.3)).train()
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(model(**CASE.inputs()).logits.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_generation_equals_stock():
    stock = led_model(CASE)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    expected = stock.generate(**CASE.inputs(), **settings)
    assert torch.equal(fused(stock).generate(**CASE.inputs(), **settings), expected)


def test_autocast():
    stock = longformer_model(CASE)
    with torch.no_grad():
        with true_fp64():
            exact = copy.deepcopy(stock).double()(**CASE.inputs()).logits
        with torch.autocast("cpu", torch.bfloat16):
            error = (stock(**CASE.inputs()).logits - exact).abs()
            ours = (fused(stock)(**CASE.inputs()).logits - exact).abs()
    assert ours.max() <= 2 * error.max()
