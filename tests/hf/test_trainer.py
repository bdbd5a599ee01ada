"""transformers' Seq2SeqTrainer trains the drop-in and led_model as it trains transformers' own model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")

import torch
from accelerate.state import AcceleratorState
from accelerate.utils.operations import convert_outputs_to_fp32
from decoding import VERSION
from hf_cases import HFCase, fused, led_model, longformer_model
from torch import nn
from training_cases import (
    MODELS,
    Rows,
    assert_same_run,
    batch,
    difference,
    own_model,
    stock_model,
    trained,
    trainer_of,
    weights,
)
from transformers import LEDForConditionalGeneration, LongformerForMaskedLM

import led_model as own
from led_kernels.hf import apply_led_kernels, revert_led_kernels
from tests.model.small import small_config

every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def _no_precision_of_another_test(monkeypatch):
    """accelerate remembers a precision, and transformers 4 asks for it by the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def expected_run(smoothing: float = 0.0) -> dict:
    """Returns what Trainer makes of transformers' own model in batches of four rows."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return trained(trainer_of(stock_model(), directory, label_smoothing_factor=smoothing))


@every_model
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["", "smoothed"])
@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_gradients_are_the_same_however_rows_are_split(batch_size, smoothing, build, tmp_path):
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    trainer = trainer_of(build(), tmp_path, label_smoothing_factor=smoothing, **settings)
    assert_same_run(trained(trainer), expected_run(smoothing))


@every_model
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_checkpointing(reentrant, build, tmp_path):
    model = build()
    calls = []
    for stack in (model.led.encoder, model.led.decoder):
        stack.layers[0].fc1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same_run(trained(trainer_of(model, tmp_path, **settings)), expected_run())
    assert len(calls) == 2 * 2 * 3  # two stacks, forward and backward, three steps
    assert calls.count(False) == (6 if reentrant else 0)


@every_model
def test_bf16(build, tmp_path):
    stock = trained(trainer_of(stock_model(), tmp_path, bf16=True))
    ours = trained(trainer_of(build(), tmp_path, bf16=True))
    exact = expected_run()["weights"]

    def distance(run: dict) -> float:
        return sum((run["weights"][name] - exact[name]).square().sum().item() for name in exact) ** 0.5

    assert 0 < distance(ours) <= 1.5 * distance(stock)
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-2)


@every_model
def test_what_is_predicted_and_evaluated(build, tmp_path):
    settings = {"predict_with_generate": True, "generation_max_length": 8, "generation_num_beams": 2}
    stock = trainer_of(stock_model(), tmp_path, **settings)
    ours = trainer_of(build(), tmp_path, **settings)
    if VERSION < (5, 0):  # which pads to the length in the settings of the model and cannot do without it
        ours.model.generation_config.max_length = 20
    expected, predicted = stock.predict(Rows()), ours.predict(Rows())
    assert (predicted.predictions[:, :8] == expected.predictions[:, :8]).all()
    assert (predicted.predictions[:, 8:] == 1).all()
    assert predicted.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
    assert ours.predict(Rows()).predictions.tolist() == predicted.predictions.tolist()
    smoothed = {"label_smoothing_factor": 0.1}
    model = build()
    if VERSION < (5, 0):
        model.generation_config.max_length = 20
    assert trainer_of(model, tmp_path, **settings, **smoothed).evaluate()["eval_loss"] == pytest.approx(
        trainer_of(stock_model(), tmp_path, **settings, **smoothed).evaluate()["eval_loss"], rel=1e-6
    )


@every_model
def test_logits_are_predicted_without_generate(build, tmp_path):
    expected = trainer_of(stock_model(), tmp_path).predict(Rows()).predictions[0]
    predicted = trainer_of(build(), tmp_path).predict(Rows()).predictions[0]
    torch.testing.assert_close(torch.tensor(predicted), torch.tensor(expected), rtol=0, atol=1e-4)


@every_model
def test_resumed_from_a_checkpoint(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = trained(trainer_of(build(), tmp_path, **settings))
    resumed = trained(
        trainer_of(build(), tmp_path, **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    assert difference(resumed["weights"], whole["weights"]) == 0
    assert resumed["losses"][-2:] == whole["losses"][-2:]


def test_best_checkpoint_of_led_model_is_loaded_and_transformers_reads_what_is_saved(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(own_model(), tmp_path, load_best_model_at_end=True, **settings)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    stock = LEDForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    inputs = batch(range(2))
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.model.eval()(**inputs).logits, stock(**inputs).logits, atol=1e-4, rtol=0
        )
    # Tied weights are stored once, and come back as one.
    other = own_model()
    other.load_state_dict(trainer.model.state_dict())
    assert difference(weights(other), weights(trainer.model)) == 0
    assert other.lm_head.weight is other.led.encoder.embed_tokens.weight is other.led.shared.weight


@every_model
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_lora(checkpointing, build, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")

    def run(model: nn.Module, batch_size: int, **settings) -> dict:
        # led_model has one projection where transformers has query, key and value of a self-attention.
        targets = r".*(encoder_attn\.[qkv]_proj|fc1|fc2|self_attn\.output|query_global|value_global)"
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM")
        )
        if settings:
            model.enable_input_require_grads()
        adapters = {
            name.replace("longformer_self_attn.", ""): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        for index, name in enumerate(sorted(adapters)):
            drawn = torch.randn(adapters[name].shape, generator=torch.Generator().manual_seed(index))
            adapters[name].data = drawn / 10
        splits = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        trainer = trainer_of(model, tmp_path, **splits, **settings)
        return trained(trainer) | {"weights": {name: p.detach().clone() for name, p in adapters.items()}}

    expected = run(stock_model(), 4)
    assert len(expected["weights"]) >= 40
    extra = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert_same_run(run(build(), 1, **extra if checkpointing else {}), expected)


@pytest.mark.slow
@every_model
def test_torch_compile(build, tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_same_run(trained(trainer_of(build(), tmp_path, **settings)), expected_run())


@every_model
def test_plain_loop_in_fp16_with_a_gradient_scaler(build):
    """The first scale is too large: that step is left out, as for transformers' model."""

    def run(model: nn.Module, is_half: bool) -> tuple[dict, float]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        scaler = torch.amp.GradScaler("cpu", enabled=is_half, init_scale=2.0**24)
        for step in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=is_half):
                loss = model(**batch(range(4))).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert step == 0 or loss.isfinite()
        return weights(model), scaler.get_scale() if is_half else 1.0

    (stock, stock_scale), (ours, scale) = run(stock_model(), True), run(build(), True)
    assert scale == stock_scale < 2.0**24
    skipped = int(torch.tensor(2.0**24 / scale).log2())
    assert 0 < skipped < 12
    before = weights(build())
    moved = sum((stock[name] - before[name]).square().sum().item() for name in stock) ** 0.5
    apart = sum((ours[name] - stock[name]).square().sum().item() for name in stock) ** 0.5
    assert apart <= 0.01 * moved


@every_model
def test_fp16_states_that_overflow_are_clamped_in_training(build):
    def run(model: nn.Module) -> tuple[float, torch.Tensor]:
        model.half().train()
        layer = model.led.encoder.layers[-1]
        layer.final_layer_norm.weight.data.fill_(6e4)
        for reader in model.led.decoder.layers:
            for projection in (reader.encoder_attn.k_proj, reader.encoder_attn.v_proj):
                projection.weight.data.mul_(1e-4)
        states = []
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
        loss = model(**batch(range(2))).loss
        loss.backward()
        hidden = states[0] if isinstance(states[0], torch.Tensor) else states[0][0]
        assert hidden.abs().max() == torch.tensor(torch.finfo(torch.float16).max - 1000).half()
        return loss.item(), layer.fc2.weight.grad

    (loss, gradient), (our_loss, our_gradient) = run(stock_model()), run(build())
    assert our_loss == pytest.approx(loss, rel=1e-2)
    assert our_gradient.isfinite().all()
    assert (our_gradient - gradient).abs().max() <= 0.05 * gradient.abs().max()


HEADS = (own.LEDForQuestionAnswering, own.LEDForSequenceClassification)


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_of_led_model_say_that_their_loss_is_a_mean(head):
    assert head(own.LEDConfig(**small_config(0))).accepts_loss_kwargs is False


def test_heads_of_longformer_have_the_same_gradients_however_rows_are_split(tmp_path):
    case = HFCase(positions=32)

    def norms(batch_size: int) -> list[float]:
        class Masked(Rows):
            def __getitem__(self, index):
                one = super().__getitem__(index)
                kept = ("input_ids", "attention_mask", "global_attention_mask")
                return {name: one[name] for name in kept} | {"labels": one["input_ids"]}

        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        trainer = trainer_of(fused(longformer_model(case)), tmp_path, **settings)
        trainer.train_dataset = Masked()
        return trained_norms(trainer)

    assert norms(1) == pytest.approx(norms(4), rel=1e-4)


def trained_norms(trainer) -> list[float]:
    trainer.train()
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def test_heads_say_how_their_loss_is_normalized_as_long_as_they_are_fused():
    from led_kernels.hf.classes import HEADS as TABLE

    case = HFCase()
    stock, masked = led_model(case), longformer_model(case)
    assert not hasattr(stock, "accepts_loss_kwargs")
    apply_led_kernels(stock)
    apply_led_kernels(masked)
    assert masked.accepts_loss_kwargs is False
    assert type(masked).__name__ == "LongformerForMaskedLM"
    assert isinstance(masked, LongformerForMaskedLM)
    for model in (stock, masked):
        revert_led_kernels(model)
        assert not hasattr(model, "accepts_loss_kwargs")
    apply_led_kernels()
    for stock_class in TABLE:
        config = case.led_config() if stock_class.__name__.startswith("LED") else case.longformer_config()
        model = stock_class(config)
        if stock_class is LEDForConditionalGeneration:
            assert isinstance(model.accepts_loss_kwargs, bool)
        else:
            assert model.accepts_loss_kwargs is False


class OwnLoss(LEDForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_head_with_a_forward_of_its_own_keeps_it_and_its_mean():
    model = led_model(HFCase())
    model.__class__ = OwnLoss
    apply_led_kernels(model)
    assert type(model).forward is OwnLoss.forward
    assert model.accepts_loss_kwargs is False


class DivisorOfItsOwn(OwnLoss):
    accepts_loss_kwargs = True


class OwnMaskedLoss(LongformerForMaskedLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_head_with_a_forward_of_its_own_says_what_its_class_says():
    for cls, build, expected in (
        (DivisorOfItsOwn, led_model, True),
        (OwnMaskedLoss, longformer_model, False),
    ):
        model = build(HFCase())
        model.__class__ = cls
        apply_led_kernels(model)
        assert type(model).forward is cls.forward
        assert model.accepts_loss_kwargs is expected
        revert_led_kernels(model)
        assert type(model) is cls


def test_head_that_accelerate_has_wrapped_keeps_its_forward(tmp_path: Path):
    model = led_model(HFCase(positions=32))
    expected = model(**batch(range(2))).loss
    model.forward = convert_outputs_to_fp32(model.forward)
    apply_led_kernels(model)
    assert model.accepts_loss_kwargs is False
    torch.testing.assert_close(model(**batch(range(2))).loss, expected)


def test_loss_is_divided_by_the_number_that_is_given():
    inputs = batch(range(4))
    count = (inputs["labels"] != -100).sum()
    for build in MODELS.values():
        model = build().train()
        mean = model(**inputs).loss
        for number in (count, int(count)):
            torch.testing.assert_close(model(**inputs, num_items_in_batch=number).loss, mean)
        torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count).loss, mean / 2)
        assert (
            model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}, num_items_in_batch=3).loss
            == 0
        )
        half = model.bfloat16()(**inputs, num_items_in_batch=count).loss
        assert half.dtype == torch.float32
        as_tuple = model.float()
        if build is not own_model:
            out = as_tuple(**inputs, num_items_in_batch=count, return_dict=False)
            assert isinstance(out, tuple)
            assert out[0].shape == ()
