"""Models loaded with 4-bit or int8 weights: which, how exact, and everything that goes on working."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from led_kernels import projection
from led_model import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
)
from led_model.checkpoint.checkpoint import load_pretrained
from led_model.checkpoint.quantization import choose_quantizer, quantizable_linears
from tests.model.small import random_inputs, randomize, small_config

pytestmark = pytest.mark.usefixtures("plain_four_bits")

HEADS = [LEDForConditionalGeneration, LEDForQuestionAnswering, LEDForSequenceClassification]
# the largest error of a weight: half of the widest gap between the values that it can take, relative to the
# largest magnitude of its block (NF4: -1 and -0.6962) or row (int8: steps of 1/127.5)
LARGEST_ERROR = {"load_in_4bit": 0.152, "load_in_8bit": 0.5 / 127.5}


@pytest.fixture(params=["load_in_4bit", "load_in_8bit"])
def request_name(request: pytest.FixtureRequest) -> str:
    package = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "torchao"}[request.param]
    pytest.importorskip(package, reason=f"{package} is not installed; pip install '.[quant]'")
    return request.param


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path)


def saved(directory: Path, model_class: type = LEDForConditionalGeneration) -> Path:
    # On processors with AVX-512 bitsandbytes computes layers rightly whose width is a multiple of 64, and those alone.
    sizes = {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 64}
    model = model_class(LEDConfig(**small_config(1, **sizes)))
    randomize(model, 1)
    model.save_pretrained(directory)
    return directory


def effective_weight(linear: nn.Linear) -> Tensor:
    """Returns ``[out, in]`` of whatever the layer multiplies by."""
    with torch.no_grad():
        return (linear(torch.eye(linear.in_features)) - linear.bias).T


def with_effective_weights(directory: Path, quantized: nn.Module) -> nn.Module:
    """Returns a plain model whose weights are what those of ``quantized`` mean."""
    plain = type(quantized).from_pretrained(directory)
    for name, linear in quantizable_linears(quantized).items():
        plain.get_submodule(name).weight.data.copy_(effective_weight(linear))
    return plain


@pytest.mark.parametrize("model_class", HEADS)
def test_the_layers_weights_and_nothing_else_become_small(
    tmp_path: Path, request_name: str, model_class: type
) -> None:
    saved(tmp_path, model_class)
    plain = model_class.from_pretrained(tmp_path)
    quantized = model_class.from_pretrained(tmp_path, **{request_name: True})
    changed = quantizable_linears(plain)
    config = plain.config
    assert len(changed) == 7 * config.encoder_layers + 8 * config.decoder_layers  # qkv is one
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(quantized.get_parameter(name), parameter), name
    for name, linear in changed.items():
        weight = linear.weight.detach()
        error = (effective_weight(quantized.get_submodule(name)) - weight).abs()
        width = {"load_in_4bit": 64, "load_in_8bit": weight.shape[1]}[request_name]
        for part, largest in zip(error.flatten().split(width), weight.flatten().split(width), strict=True):
            assert part.max() <= LARGEST_ERROR[request_name] * largest.abs().max() * 1.01, name
        assert error.max() > 0, name


@pytest.mark.parametrize("model_class", HEADS)
def test_a_model_computes_with_what_its_weights_mean(
    tmp_path: Path, request_name: str, model_class: type
) -> None:
    saved(tmp_path, model_class)
    quantized = model_class.from_pretrained(tmp_path, **{request_name: True})
    plain = with_effective_weights(tmp_path, quantized)
    inputs = random_inputs(3)
    if model_class is LEDForSequenceClassification:
        del inputs["decoder_input_ids"]
        inputs["input_ids"][:, -1] = quantized.config.eos_token_id
    results = []
    for model in (quantized, plain):
        output = model(**inputs)
        logits = output.start_logits if model_class is LEDForQuestionAnswering else output.logits
        logits.square().mean().backward()
        results.append((logits, model.base_model.encoder.embed_positions.weight.grad))
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_what_its_weights_mean(checkpoint: Path, request_name: str, settings: dict) -> None:
    quantized = LEDForConditionalGeneration.from_pretrained(checkpoint, **{request_name: True})
    plain = with_effective_weights(checkpoint, quantized)
    inputs = random_inputs(2)
    del inputs["decoder_input_ids"]
    ours, expected = (m.generate(**inputs, max_new_tokens=12, **settings) for m in (quantized, plain))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["on loading", "afterwards"])
def test_other_dtypes(
    checkpoint: Path, tmp_path: Path, request_name: str, dtype: torch.dtype, when: str
) -> None:
    rounded = tmp_path / "rounded"  # before they are quantized, the weights are the same in both dtypes
    LEDForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).save_pretrained(rounded)
    small = {request_name: True}
    exact = LEDForConditionalGeneration.from_pretrained(rounded, dtype=torch.float32, **small)
    plain = with_effective_weights(rounded, exact)
    model = exact
    if when == "on loading":
        model = LEDForConditionalGeneration.from_pretrained(rounded, **small)
    inputs = random_inputs(3)
    with torch.no_grad():
        expected = exact(**inputs).logits
        ours, plain_logits = model.to(dtype)(**inputs).logits, plain.to(dtype)(**inputs).logits
    assert ours.dtype == dtype
    assert (ours - expected).norm() <= 2 * (plain_logits - expected).norm()
    assert model.generate(inputs["input_ids"], max_new_tokens=3).shape == (3, 4)


def test_absorbed_projections_step_aside(
    checkpoint: Path, request_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    absorbed = projection.absorbed_global_attention
    monkeypatch.setattr(
        projection, "absorbed_global_attention", lambda *a, **k: calls.append(a) or absorbed(*a, **k)
    )
    inputs = random_inputs(1, batch=1)
    LEDForConditionalGeneration.from_pretrained(checkpoint)(**inputs)
    assert len(calls) == 2
    LEDForConditionalGeneration.from_pretrained(checkpoint, **{request_name: True})(**inputs)
    assert len(calls) == 2


def test_weights_are_quantised_one_by_one(checkpoint: Path, request_name: str) -> None:
    quantize = choose_quantizer(**{"load_in_4bit": False, "load_in_8bit": False, request_name: True},
                                quantization_config=None)  # fmt: skip
    full = []

    def record(linear: nn.Linear) -> nn.Linear:
        assert not any(weight() is not None for weight in full)
        full.append(weakref.ref(linear.weight))
        return quantize(linear)

    model = load_pretrained(LEDForConditionalGeneration, checkpoint, quantize=record)
    assert len(full) == len(quantizable_linears(model))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_saving_is_refused(checkpoint: Path, request_name: str, tmp_path: Path) -> None:
    model = LEDForConditionalGeneration.from_pretrained(checkpoint, **{request_name: True})
    with pytest.raises(ValueError, match="quantized and cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_four_bit_weights_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.56")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to quantize")
    saved(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    settings = {"device_map": "auto", "quantization_config": config, "dtype": torch.float32}
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, **settings)
    inputs = random_inputs(3)
    with torch.no_grad():
        expected = stock(**inputs).logits
    for arguments in (settings, {"load_in_4bit": True}):
        ours = LEDForConditionalGeneration.from_pretrained(tmp_path, **arguments)(**inputs).logits
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_settings_of_a_config_are_kept(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = four_bit_config(
        bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
    )
    model = LEDForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config)
    for linear in quantizable_linears(model).values():
        assert linear.weight.quant_state.quant_type == "fp4"
        assert linear.weight.quant_state.nested
        assert linear.compute_dtype == torch.bfloat16


def four_bit_config(**settings) -> SimpleNamespace:
    defaults = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": torch.uint8,
        "llm_int8_skip_modules": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "give one of them"),
        ({"load_in_4bit": True, "quantization_config": four_bit_config()}, "give one of them"),
        ({"quantization_config": four_bit_config(load_in_4bit=False)}, "without load_in_4bit=True"),
        ({"quantization_config": {"bits": 2}}, "without load_in_4bit=True"),
        ({"quantization_config": four_bit_config(llm_int8_skip_modules=["fc1"])}, "leave it out"),
        ({"device_map": "balanced"}, 'give "auto"'),
    ],
)
def test_contradictions_are_named(checkpoint: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LEDForConditionalGeneration.from_pretrained(checkpoint, **arguments)


@pytest.mark.parametrize(
    ("argument", "package"), [("load_in_4bit", "bitsandbytes"), ("load_in_8bit", "torchao")]
)
def test_a_missing_package_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, argument: str, package: str
) -> None:
    for module in (package, f"{package}.nn", f"{package}.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{argument} needs {package}; run `pip install '\.\[quant\]'`"):
        LEDForConditionalGeneration.from_pretrained(checkpoint, **{argument: True})
