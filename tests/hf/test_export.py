"""Fused models can be exported, for one length or for any, traced by torch.jit, and transformed by torch.func."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from hf_cases import BUILDERS, HFCase, assert_close, fused, led_model, true_fp64
from torch import Tensor, nn
from torch.export import Dim, export

from led_kernels import LongformerMask, banded_attention

CASE = HFCase(windows=(8,), globals_per_row=((0, 9), (4,)), padding=("none", "right"))
OTHER = HFCase(
    seqlen=33, globals_per_row=((0,), (2, 31)), padding=("holes", "left")
)  # another length and padding


class Encoder(nn.Module):
    """Returns hidden states of a model's encoder alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        return self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            return_dict=True,
        ).last_hidden_state


def states(model: nn.Module, case: HFCase) -> Tensor:
    """Compares the rows of tokens that are no padding."""
    with torch.no_grad():
        return model(**case.inputs())[case.inputs()["attention_mask"].bool()]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
class TestExportedEncoder:
    def test_of_one_length(self, build, strict):
        stock = build(CASE)
        program = export(Encoder(fused(stock, max_globals=2)), (), kwargs=CASE.inputs(), strict=strict)
        torch.testing.assert_close(
            states(program.module(), CASE), states(Encoder(stock), CASE), rtol=0, atol=2e-5
        )

    def test_of_any_length(self, build, strict):
        stock, length = build(CASE), Dim("length", min=2, max=90)  # from fewer tokens than global ones
        program = export(
            Encoder(fused(stock, max_globals=5)),
            (),
            kwargs=CASE.inputs(),
            dynamic_shapes={name: {1: length} for name in CASE.inputs()},
            strict=strict,
        )
        for case in (CASE, OTHER):
            torch.testing.assert_close(
                states(program.module(), case), states(Encoder(stock), case), rtol=0, atol=2e-5
            )


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        mask = LongformerMask.from_lengths(lengths, q.shape[1], max_globals=0)
        return banded_attention(q, k, v, mask, window_size=4)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one-length", "any-length"])
def test_exported_attention(dynamic, strict):
    def inputs(seqlen: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seqlen)
        qkv = torch.randn(3, 2, seqlen, 2, 8, generator=generator)
        return *qkv, torch.tensor([seqlen, seqlen - 3])

    length = Dim("length", min=5, max=512)
    shapes = ({1: length},) * 3 + (None,) if dynamic else None
    program = export(Attention(), inputs(19), dynamic_shapes=shapes, strict=strict).module()
    for seqlen in (19, 40) if dynamic else (19,):
        torch.testing.assert_close(program(*inputs(seqlen)), Attention()(*inputs(seqlen)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_traced_encoder(build):
    """A trace is of one length and one number of global tokens; padding and their places are the batch's."""
    stock, inputs = build(CASE), tuple(CASE.inputs().values())
    traced = torch.jit.trace(Encoder(fused(stock, max_globals=2)), inputs, check_trace=False)
    other = HFCase(windows=(8,), globals_per_row=((3, 18), (7, 8)), padding=("holes", "none"))
    with torch.no_grad():
        for case in (CASE, other):
            real = case.inputs()["attention_mask"].bool()
            actual = traced(*case.inputs().values())[real]
            torch.testing.assert_close(actual, states(Encoder(stock), case), rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_functional_gradients(build):
    """torch.func.grad differentiates a loss by the parameters, with each token's probabilities asked for or not."""

    def gradients(model: nn.Module, **flags) -> dict[str, Tensor]:
        inputs, parameters = CASE.inputs(), dict(model.named_parameters(remove_duplicate=True))

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            given = inputs | {"labels": inputs["input_ids"]} | flags
            return torch.func.functional_call(model, parameters, (), given).loss

        with true_fp64():
            return torch.func.grad(loss)(parameters)

    stock = build(CASE).double()
    ours = fused(stock, max_globals=2)  # a copy, which some releases do not allow after functional_call
    for flags in ({}, {"output_attentions": True}):
        assert_close(gradients(ours, **flags), gradients(stock, **flags), 1e-10)


def test_functional_gradient_of_a_frozen_encoder():
    """Only the decoder is trained here."""
    model = fused(led_model(CASE)).requires_grad_(False)
    name = "led.decoder.layers.0.fc1.weight"
    weight = model.get_parameter(name)

    def loss(value: Tensor) -> Tensor:
        given = CASE.inputs() | {"labels": CASE.inputs()["input_ids"]}
        return torch.func.functional_call(model, {name: value}, (), given).loss

    ours = torch.func.grad(loss)(weight)
    weight.requires_grad_()
    loss(weight).backward()
    torch.testing.assert_close(ours, weight.grad)
