"""Models that transformers quantized, as on LED's model card, run the fused encoder with the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from led_kernels import projection
from led_kernels.hf import apply_led_kernels
from led_kernels.hf import shared as fused_encoder
from led_kernels.hf.probe import encoder_difference
from led_kernels.testing import assert_within_error_bound
from tests.hf.hf_cases import HFCase, led_model, longformer_model

transformers = pytest.importorskip("transformers", minversion="4.56")  # from_pretrained(dtype=...)
accelerate = pytest.importorskip("accelerate", reason="transformers needs accelerate to quantize")

pytestmark = pytest.mark.usefixtures("plain_four_bits")

CASE = HFCase(globals_per_row=((0,), (0,)), padding=("none", "right"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    led_model(CASE).save_pretrained(tmp_path)
    return tmp_path


def load_in_4bit(directory: Path, dtype: torch.dtype) -> nn.Module:
    """This is the model card's code: https://huggingface.co/docs/transformers/model_doc/led."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4"
    )
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        directory, dtype=dtype, device_map="auto", quantization_config=quantization_config
    )


def load_in_8bit(directory: Path, dtype: torch.dtype) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        directory, dtype=dtype, quantization_config=config
    )


@pytest.fixture(params=[load_in_4bit, load_in_8bit])
def load(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names of what runs: ``fused`` for each layer's self-attention, ``absorbed`` where it is."""
    for family in ("led", "longformer"):
        encoder_difference(family)  # is asked once for a process, and not to be counted
    calls = []

    def count(module, name: str, label: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(label) or function(*a, **k))

    count(fused_encoder, "encoder_self_attention", "fused")
    count(projection, "absorbed_global_attention", "absorbed")
    return calls


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = CASE.inputs()
    return model(**inputs, decoder_input_ids=inputs["input_ids"][:, :7]).logits


def generate(model: nn.Module) -> Tensor:
    return model.generate(**CASE.inputs(), max_new_tokens=8, min_new_tokens=8)


def test_plain_weights_are_absorbed(directory: Path, fused_calls: list[str]) -> None:
    """Float layers are absorbed; otherwise the tests below would not show that quantized ones are left alone."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    apply_led_kernels(model)
    logits(model)
    assert fused_calls == ["fused", "absorbed"] * 2


@pytest.mark.parametrize("when", ["before loading", "afterwards"])
def test_results_are_those_of_transformers(directory: Path, load, when: str, fused_calls: list[str]) -> None:
    stock = load(directory, torch.float32)
    expected, tokens = logits(stock), generate(stock)
    assert not fused_calls
    if when == "before loading":
        apply_led_kernels()
        model = load(directory, torch.float32)
    else:
        model = stock
        apply_led_kernels(model)
    assert type(model.led.encoder.layers[0].fc1.weight) is not nn.Parameter
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls == ["fused"] * 2  # and nothing was absorbed
    assert torch.equal(generate(model), tokens)


def test_the_model_cards_bfloat16(directory: Path) -> None:
    # weights that bfloat16 holds exactly get the same 4 bits in both dtypes
    transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(
        directory
    )
    oracle = logits(load_in_4bit(directory, torch.float32))
    model = load_in_4bit(directory, torch.bfloat16)
    plain = logits(model)
    apply_led_kernels(model)
    assert_within_error_bound(logits(model), oracle, plain, "logits", floor_ulps=16)
    assert generate(model).shape == (2, 9)


@pytest.mark.parametrize("when", ["before hooks", "after hooks"])
def test_accelerates_hooks_run_the_fused_code(
    directory: Path, when: str, fused_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU ``device_map`` hooks every module of a quantized model; without one, hooks have to be forced."""
    model = load_in_4bit(directory, torch.float32)
    expected = logits(model)
    if when == "before hooks":
        apply_led_kernels(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if when == "after hooks":
        apply_led_kernels(model)
    attention = model.led.encoder.layers[0].self_attn.longformer_self_attn
    assert hasattr(model.led.encoder, "_old_forward")
    assert hasattr(attention.query, "_old_forward")
    monkeypatch.setattr(attention.stock_class, "_sliding_chunks_query_key_matmul", None)  # stock code fails
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert fused_calls == ["fused"] * 2


def test_longformer(tmp_path: Path, fused_calls: list[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    longformer_model(CASE).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="auto", quantization_config=config
    )
    with torch.no_grad():
        expected = model(**CASE.inputs()).logits
        apply_led_kernels(model)
        ours = model(**CASE.inputs()).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert fused_calls == ["fused"] * 2
