"""Kernels are applied and reverted on live models, models still to be built, subclasses and copies, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from hf_cases import BUILDERS, HFCase, assert_close, fused, led_model, longformer_model, outputs
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    LEDForConditionalGeneration,
    LEDModel,
    LongformerForMaskedLM,
    LongformerModel,
)
from transformers.models.led.modeling_led import LEDEncoder, LEDEncoderSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from led_kernels.hf import apply_led_kernels, is_applied, revert_led_kernels
from led_kernels.hf.shared import FusedSelfAttention
from led_model import LEDConfig as OwnConfig
from led_model import LEDModel as OwnModel

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))


def is_fused(model: nn.Module) -> bool:
    attentions = [
        m for m in model.modules() if isinstance(m, (LEDEncoderSelfAttention, LongformerSelfAttention))
    ]
    assert attentions
    answers = {isinstance(m, FusedSelfAttention) for m in attentions}
    assert len(answers) == 1
    return answers.pop()


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys())
def stock(request) -> nn.Module:
    return request.param(CASE)


def test_revert_gives_back_stock_bits(stock):
    expected, keys = outputs(stock, CASE.inputs()), list(stock.state_dict())
    classes, attributes = [type(m) for m in stock.modules()], [set(vars(m)) for m in stock.modules()]
    assert not is_applied(stock)
    assert apply_led_kernels(stock) is stock
    assert is_applied(stock)
    assert is_fused(stock)
    assert list(stock.state_dict()) == keys
    assert_close(outputs(stock, CASE.inputs()), expected, 1e-4)
    revert_led_kernels(stock)
    assert not is_applied(stock)
    assert [type(m) for m in stock.modules()] == classes
    assert [set(vars(m)) for m in stock.modules()] == attributes
    assert_close(outputs(stock, CASE.inputs()), expected, 0)


def test_apply_and_revert_twice(stock):
    expected = outputs(stock, CASE.inputs())
    apply_led_kernels(stock, backend="reference")
    apply_led_kernels(stock)
    revert_led_kernels(stock)
    revert_led_kernels(stock)
    assert_close(outputs(stock, CASE.inputs()), expected, 0)


def test_models_built_after_a_global_apply(tmp_path):
    models = {"led": led_model(CASE), "longformer": longformer_model(CASE)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    stock = LEDModel(CASE.led_config())
    apply_led_kernels()
    built = [
        LEDModel(CASE.led_config()),
        LongformerModel(CASE.longformer_config()),
        AutoModel.from_config(CASE.longformer_config()),
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "led"),
        LEDForConditionalGeneration.from_pretrained(tmp_path / "led"),
        LongformerForMaskedLM.from_pretrained(tmp_path / "longformer"),
    ]
    assert all(is_fused(model) for model in built)
    assert not is_fused(stock)
    for model, name in zip(built[-2:], models, strict=True):
        assert_close(outputs(model.eval(), CASE.inputs()), outputs(models[name], CASE.inputs()), 1e-4)
    revert_led_kernels()
    assert not any(is_fused(model) for model in built)
    assert not is_fused(LEDModel(CASE.led_config()))
    assert LEDEncoder.__init__.__module__.startswith("transformers")
    assert not hasattr(LEDEncoder.__init__, "__wrapped__")


def test_saved_models_carry_stock_names(stock, tmp_path):
    architecture = type(stock).__name__
    apply_led_kernels(stock)
    stock.save_pretrained(tmp_path)
    assert type(stock).from_pretrained(tmp_path).config.architectures == [architecture]
    base = stock.base_model
    base.save_pretrained(tmp_path)
    assert base.config.architectures == [type(base).__name__]
    assert type(base).__name__ in ("LEDModel", "LongformerModel")


def test_copies_and_pickles_stay_fused(stock):
    apply_led_kernels(stock)
    expected = outputs(stock, CASE.inputs())
    for twin in (copy.deepcopy(stock), pickle.loads(pickle.dumps(stock))):
        assert is_fused(twin)
        assert_close(outputs(twin, CASE.inputs()), expected, 0)


def test_only_the_given_model_changes(stock):
    other = copy.deepcopy(stock)
    apply_led_kernels(stock)
    assert not is_fused(other)


def test_part_of_a_model_is_enough():
    model = led_model(CASE)
    expected = outputs(model, CASE.inputs())
    apply_led_kernels(nn.ModuleList([model.get_encoder()]))
    assert is_fused(model)
    assert_close(outputs(model, CASE.inputs()), expected, 1e-4)


def test_attention_alone_takes_the_masks_of_transformers():
    """Has a self-attention whose encoder is not fused, as models with an encoder of their own have."""
    stock = longformer_model(CASE)
    expected = outputs(stock, inputs := HFCase(seqlen=24, globals_per_row=((0, 9), (4,))).inputs())
    for layer in stock.longformer.encoder.layer:
        apply_led_kernels(layer)
    assert type(stock.longformer.encoder).__module__.startswith("transformers")
    assert_close(outputs(stock, inputs), expected, 1e-4)


class OwnEncoder(LEDEncoder):
    """Is a subclass that keeps the forward."""


class OwnSelfAttention(LEDEncoderSelfAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_subclass_that_inherits_the_forward():
    model = led_model(CASE)
    expected = outputs(model, CASE.inputs())
    model.get_encoder().__class__ = OwnEncoder
    apply_led_kernels(model)
    assert isinstance(model.get_encoder(), OwnEncoder)
    assert_close(outputs(model, CASE.inputs()), expected, 1e-4)
    revert_led_kernels(model)
    assert type(model.get_encoder()) is OwnEncoder
    assert_close(outputs(model, CASE.inputs()), expected, 0)


def test_subclass_with_a_forward_of_its_own_is_refused():
    model = led_model(CASE)
    model.get_encoder().layers[1].self_attn.longformer_self_attn.__class__ = OwnSelfAttention
    with pytest.raises(TypeError, match="OwnSelfAttention overrides the forward"):
        apply_led_kernels(model)
    assert not isinstance(model.get_encoder().layers[0].self_attn.longformer_self_attn, FusedSelfAttention)


def test_forward_replaced_on_an_instance_is_refused():
    model = led_model(CASE)
    encoder, forward = model.get_encoder(), model.get_encoder().forward
    encoder.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(TypeError, match="forward of a LEDEncoder was replaced"):
        apply_led_kernels(model)
    assert not is_fused(model)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (["led"], {}, TypeError, "model is a str; give a torch.nn.Module"),
        ([nn.Linear(2, 2)], {}, ValueError, "no LED or Longformer modules"),
        ([], {"max_globals": -1}, ValueError, "max_globals is -1"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        apply_led_kernels(*arguments, **options)


def test_model_of_led_model_is_on_the_kernels_already():
    model = OwnModel(OwnConfig.from_dict(CASE.led_config().to_dict()))
    with pytest.raises(ValueError, match="already on the kernels; use it as it is"):
        apply_led_kernels(model)


@pytest.mark.parametrize("implementation", ["eager", "own"])
def test_any_attention_implementation(implementation, tmp_path):
    """The mask may be one for which transformers would build no causal mask."""
    stock = led_model(CASE)
    stock.save_pretrained(tmp_path)
    if implementation == "own":
        attention = pytest.importorskip("transformers").AttentionInterface
        attention.register("own", lambda *args, **kwargs: None)
    model = type(stock).from_pretrained(tmp_path, attn_implementation=implementation).eval()
    expected = outputs(stock, CASE.inputs())
    apply_led_kernels(model)
    assert_close(outputs(model, CASE.inputs()), expected, 1e-4)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_capacity_for_globals(build):
    """Results are the same, and attentions have a column per slot."""
    stock = build(CASE)
    expected = outputs(stock, CASE.inputs())
    actual = outputs(fused(stock, max_globals=5), CASE.inputs())
    for name, value in expected.items():
        got = actual[name]
        if name.startswith("global_attentions"):
            got = got[..., :2]
        elif name.startswith("attentions"):
            assert not got[..., 2:5].any()
            got = torch.cat([got[..., :2], got[..., 5:]], -1)
        torch.testing.assert_close(got, value, rtol=0, atol=1e-4 * max(1, value.abs().max()))


def counting_backend(inner: str) -> tuple[Callable, list]:
    """Returns a torch.compile backend, and the list of graphs that it is given."""
    graphs, compile_graph = [], lookup_backend(inner)

    def backend(graph, example_inputs):
        graphs.append(graph)
        return compile_graph(graph, example_inputs)

    return backend, graphs


def encoder_inputs(seqlen: int, masks: str) -> dict[str, Tensor]:
    inputs = HFCase(
        seqlen=seqlen, globals_per_row=((0, seqlen - 2), (4,)), padding=("none", "right")
    ).inputs()
    names = ["input_ids", "attention_mask", "global_attention_mask"]
    return {name: inputs[name] for name in names[: {"none": 1, "padding": 2, "padding and global": 3}[masks]]}


@pytest.mark.parametrize("masks", ["none", "padding", "padding and global"])
def test_one_compiled_encoder_for_all_lengths(masks):
    """There is no graph break; with ``dynamic=True`` even the first length is a symbol of the graph."""
    torch._dynamo.reset()
    model = fused(led_model(CASE), max_globals=2).get_encoder()
    backend, graphs = counting_backend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seqlen in (19, 24, 7, 64, 33, 90):
        inputs = encoder_inputs(seqlen, masks)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)
    assert len(graphs) == 1


def test_compiled_training_step_for_all_lengths():
    """By default torch takes the first length for the only one, and the second for one of many: two graphs."""
    torch._dynamo.reset()
    model = fused(led_model(CASE), max_globals=2).get_encoder()
    backend, graphs = counting_backend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seqlen in (19, 24, 7, 64, 33):
        results = []
        for encoder in (model, compiled):
            model.zero_grad()
            hidden = encoder(**encoder_inputs(seqlen, "padding and global")).last_hidden_state
            hidden.square().mean().backward()
            results.append({n: p.grad for n, p in model.named_parameters()} | {"out": hidden.detach()})
        assert_close(results[1], results[0], 1e-5)
    assert len(graphs) == 2


def test_stock_encoder_breaks_the_graph():
    torch._dynamo.reset()
    compiled = torch.compile(led_model(CASE).get_encoder(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(**CASE.inputs())
