"""Modules that others changed work in fused models: forward hooks, LoRA, accelerate's hooks and offloading."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")

import accelerate
import torch
from hf_cases import BUILDERS, HFCase, fused, led_model
from torch import Tensor, nn
from transformers import AutoModel

from led_kernels import LongformerMask
from led_kernels.hf import apply_led_kernels, revert_led_kernels
from led_kernels.hf.probe import encoder_difference, right_decoder

CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys())
def stock(request) -> nn.Module:
    return request.param(CASE)


def attention_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "one_sided_attn_window_size"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**CASE.inputs()).logits


def count_calls(monkeypatch, model: nn.Module) -> list:
    """Returns the list of all calls of the stock attention, which a fused model must not make."""
    # These run stock models once for a process, which are not to be counted.
    right_decoder()
    for family in ("led", "longformer"):
        encoder_difference(family)
    calls = []
    stock_class = type(attention_of(model))
    original = stock_class._sliding_chunks_query_key_matmul

    def counting(self, *args):
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(stock_class, "_sliding_chunks_query_key_matmul", counting)
    return calls


@pytest.mark.parametrize("name", ["query", "key", "value", "query_global", "key_global", "value_global"])
def test_forward_hooks_of_projections_run_and_count(name, stock):
    def double_output(module, args, output):
        calls.append(args[0].shape)
        return 2 * output

    getattr(attention_of(stock), name).register_forward_hook(double_output)
    calls = []
    expected = logits(stock)
    ours = fused(stock)
    calls.clear()
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4)
    assert calls == [(2, 2, 32) if name == "query_global" else (2, 19, 32)]


class Int8Linear(nn.Module):
    """Is what quantized layers are: no nn.Linear, and with a weight that is no float."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantized_projections(stock):
    for attention in [m for m in stock.modules() if hasattr(m, "one_sided_attn_window_size")]:
        for name, projection in list(attention.named_children()):
            setattr(attention, name, Int8Linear(projection))
    torch.testing.assert_close(logits(fused(stock)), logits(stock), rtol=0, atol=1e-4)


def test_hooks_of_modules_see_stock_layouts(stock):
    """Hooks of attention, layer and encoder see the same."""
    inputs = HFCase(seqlen=24, globals_per_row=((0, 9), (4,))).inputs()
    seen = []
    attention = attention_of(stock)
    attention.register_forward_hook(lambda module, args, output: seen.append([x.shape for x in output]))
    with torch.no_grad():
        stock(**inputs, output_attentions=True)
        fused(stock)(**inputs, output_attentions=True)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("targets", [["query", "value"], ["query_global", "key_global", "value_global"]])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when, targets, stock):
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero
                nn.init.normal_(parameter, std=0.3)
        return model

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        inputs = CASE.inputs()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), **named}

    expected_model = adapted(copy.deepcopy(stock))
    if when == "before":
        apply_led_kernels(stock)
    ours = adapted(stock)
    if when == "after":
        apply_led_kernels(ours)
    assert list(ours.state_dict()) == list(expected_model.state_dict())
    expected, actual = gradients(expected_model), gradients(ours)
    assert actual.keys() == expected.keys()
    assert len(expected) > 1
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4 * max(1, value.abs().max()))
    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(expected_model), rtol=0, atol=2e-4)


def offload(model: nn.Module) -> None:
    """Hooks the modules that hold parameters themselves, and not the attention."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatch(model: nn.Module) -> None:
    """Hooks every module."""
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


ATTACHERS = {"offload": offload, "dispatch": dispatch}


@pytest.mark.parametrize("attach", ATTACHERS.values(), ids=ATTACHERS.keys())
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks(when, attach: Callable[[nn.Module], None], stock, monkeypatch):
    expected = logits(stock)
    stock_calls = count_calls(monkeypatch, stock)
    if when == "before":
        apply_led_kernels(stock)
    attach(stock)
    if when == "after":
        assert ("_old_forward" in vars(attention_of(stock))) == (attach is dispatch)
        apply_led_kernels(stock)
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-4)
    assert not stock_calls
    revert_led_kernels(stock)
    assert torch.equal(logits(stock), expected)
    assert stock_calls


@pytest.mark.parametrize("fuse_first", [False, True])
def test_removed_accelerate_hooks_leave_the_right_forward(fuse_first, stock, monkeypatch):
    """accelerate leaves the bound forward on the instance."""
    expected = logits(stock)
    dispatch(stock)
    if fuse_first:
        apply_led_kernels(stock)
    accelerate.hooks.remove_hook_from_submodules(stock)
    assert "forward" in vars(attention_of(stock))
    stock_calls = count_calls(monkeypatch, stock)
    apply_led_kernels(stock)
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-4)
    assert not stock_calls
    revert_led_kernels(stock)
    assert torch.equal(logits(stock), expected)


@pytest.mark.parametrize("globally", [False, True], ids=["live", "global"])
def test_from_pretrained_with_layers_on_disk(globally, stock, tmp_path, monkeypatch):
    base = stock.base_model
    base.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = base(**CASE.inputs())[0]
    stock_calls = count_calls(monkeypatch, stock)
    names = [name for name, _ in base.named_children() if name != "encoder"]
    layers = "layers" if stock.config.is_encoder_decoder else "layer"
    names += [f"encoder.{name}" for name, _ in base.encoder.named_children() if name != layers]
    names += ["pooler", f"encoder.{layers}.1"]  # a base model loaded by itself has a pooler
    device_map = dict.fromkeys(names, "cpu") | {f"encoder.{layers}.0": "disk"}
    if globally:
        apply_led_kernels()
    model = AutoModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert attention_of(model).query.weight.device.type == "meta"
    if not globally:
        apply_led_kernels(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**CASE.inputs())[0], expected, rtol=0, atol=1e-4)
    assert not stock_calls


def test_layers_of_a_hooked_model_share_one_mask(monkeypatch):
    model = led_model(CASE)
    offload(model)
    apply_led_kernels(model)
    built, build = [], LongformerMask.from_padding

    def counting(*args, **kwargs):
        built.append(build(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(LongformerMask, "from_padding", counting)
    logits(model)
    assert len(built) == 1
