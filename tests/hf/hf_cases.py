"""The tests share these small LED and Longformer models of transformers, their inputs, and an oracle in true fp64."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
)

from led_kernels.hf import apply_led_kernels
from led_kernels.testing import assert_within_error_bound

PAD, VOCABULARY = 1, 60


@dataclass(frozen=True)
class HFCase:
    """Holds a model's sizes and a batch for it.

    ``windows``: transformers' attention_window of each layer. ``globals_per_row``: positions of global
    tokens, the same list for a row that has none of its own. ``padding``: per batch row ``none``, ``left``,
    ``right``, ``holes`` or ``all``.
    """

    windows: tuple[int, ...] = (8, 8)
    heads: int = 4
    head_dim: int = 8
    seqlen: int = 19
    globals_per_row: tuple[tuple[int, ...], ...] = ((), ())
    padding: tuple[str, ...] = ("none", "none")
    positions: int = 96

    def led_config(self, **overrides) -> LEDConfig:
        settings = {
            "vocab_size": VOCABULARY,
            "d_model": self.heads * self.head_dim,
            "encoder_layers": len(self.windows),
            "decoder_layers": 1,
            "encoder_attention_heads": self.heads,
            "decoder_attention_heads": 1,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 24,
            "attention_window": list(self.windows),
            "max_encoder_position_embeddings": self.positions,
            "max_decoder_position_embeddings": 64,
            "init_std": 0.3,
            "dropout": 0.0,
        }
        return LEDConfig(**settings | overrides)

    def longformer_config(self, **overrides) -> LongformerConfig:
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.heads * self.head_dim,
            "num_hidden_layers": len(self.windows),
            "num_attention_heads": self.heads,
            "intermediate_size": 48,
            "attention_window": list(self.windows),
            "max_position_embeddings": self.positions + PAD + 1,
            "pad_token_id": PAD,
            "sep_token_id": 2,
            "initializer_range": 0.3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        return LongformerConfig(**settings | overrides)

    def inputs(self) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and global_attention_mask, int64 ``[batch, seqlen]``."""
        generator = torch.Generator().manual_seed(len(self.padding) * self.seqlen)
        shape = len(self.padding), self.seqlen
        attention_mask, global_attention_mask = torch.ones(shape).long(), torch.zeros(shape).long()
        for row, (padding, positions) in enumerate(zip(self.padding, self.globals_per_row, strict=True)):
            cut = (row + 1) * self.seqlen // (len(self.padding) + 2)
            if padding == "left":
                attention_mask[row, :cut] = 0
            elif padding == "right":
                attention_mask[row, self.seqlen - cut :] = 0
            elif padding == "holes":
                attention_mask[row] = torch.rand(self.seqlen, generator=generator) > 0.3
            elif padding == "all":
                attention_mask[row] = 0
            global_attention_mask[row, list(positions)] = 1
        input_ids = torch.randint(3, VOCABULARY, shape, generator=generator)
        return {
            "input_ids": input_ids.masked_fill(attention_mask == 0, PAD),
            "attention_mask": attention_mask,
            "global_attention_mask": global_attention_mask,
        }

    @classmethod
    def draw(cls, seed: int) -> HFCase:
        """Draws a random case; windows are powers of two, since transformers refuses most others."""
        rng = random.Random(seed)
        seqlen, batch = rng.randint(1, 50), rng.randint(1, 3)
        most = rng.choice([0, 1, 3, seqlen])
        return cls(
            windows=tuple(rng.choice([4, 8, 16]) for _ in range(rng.randint(1, 3))),
            heads=rng.choice([1, 2, 3]),
            head_dim=rng.choice([2, 4, 7, 16]),
            seqlen=seqlen,
            globals_per_row=tuple(
                tuple(sorted(rng.sample(range(seqlen), rng.randint(0, min(most, seqlen)))))
                for _ in range(batch)
            ),
            padding=tuple(rng.choice(["none", "left", "right", "holes", "all"]) for _ in range(batch)),
        )


def led_model(case: HFCase, **overrides) -> nn.Module:
    return varied(LEDForConditionalGeneration(case.led_config(**overrides)))


def longformer_model(case: HFCase, **overrides) -> nn.Module:
    return varied(LongformerForMaskedLM(case.longformer_config(**overrides)))


BUILDERS = {"led": led_model, "longformer": longformer_model}


def varied(model: nn.Module) -> nn.Module:
    """Draws random biases and norms, too: transformers starts them at 0 and 1, where mistakes do not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.3 if parameter.dim() > 1 else 0.5
        )
    return model.eval()


def fused(model: nn.Module, **options) -> nn.Module:
    """Returns a fused copy of a model."""
    model = copy.deepcopy(model)
    apply_led_kernels(model, **options)
    return model


@contextmanager
def true_fp64() -> Iterator[None]:
    """Lets transformers be an fp64 oracle.

    Its softmax is in fp32, also of fp64 scores; and transformers 4 builds causal masks in the default dtype, where
    the least fp64 number does not fit.
    """
    softmax, dtype = nn.functional.softmax, torch.get_default_dtype()
    nn.functional.softmax = lambda x, dim, dtype=None, **_: softmax(x, dim=dim)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        nn.functional.softmax = softmax
        torch.set_default_dtype(dtype)


def outputs(model: nn.Module, inputs: dict[str, Tensor], gradients: bool = True) -> dict[str, Tensor]:
    """Returns everything that a model returns, by name, with the loss on labels and the parameters' gradients.

    What LED's decoder makes of a document without tokens is left out: transformers gives it the mean of the padding.
    """
    labels = inputs["input_ids"].clone()
    has_tokens = inputs["attention_mask"].any(1)
    if model.config.is_encoder_decoder:
        labels = labels[:, :7].masked_fill(~has_tokens[:, None], -100)
    result = model(**inputs, labels=labels, output_attentions=True, output_hidden_states=True)
    seqlen = inputs["input_ids"].shape[1]
    named = {"loss": result.loss, "logits": result.logits}
    prefix = ""
    if model.config.is_encoder_decoder:
        prefix = "encoder_"
        for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions"):
            named |= {f"{name}[{layer}]": value[has_tokens] for layer, value in enumerate(result[name])}
        named["logits"] = result.logits[has_tokens]
        if not has_tokens.any():
            named["loss"] = result.encoder_last_hidden_state.square().mean()
    for name in ("hidden_states", "attentions", "global_attentions"):
        for layer, value in enumerate(result.get(prefix + name) or ()):
            if name == "global_attentions":
                value = _own_globals(value[:, :, :seqlen], inputs)
            named[f"{name}[{layer}]"] = value
    if gradients:
        model.zero_grad()
        named["loss"].backward()
        named |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach() for name, value in named.items() if value is not None and value.numel()}


def _own_globals(weights: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Puts zeros where a row has fewer global tokens than another, and transformers leaves filler."""
    counts = (inputs["attention_mask"] * inputs["global_attention_mask"]).sum(1)
    column = torch.arange(weights.shape[-1])
    return weights.masked_fill((column >= counts[:, None])[:, None, None, :], 0)


def assert_close(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], atol: float) -> None:
    """Asserts the same names, ``None`` in the same places, and values within ``atol`` of the largest (at least 1)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None:
            bound = atol * max(1.0, value.abs().max().item())
            torch.testing.assert_close(
                actual[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_parity(case: HFCase, stock: nn.Module, **options) -> None:
    """Asserts :func:`assert_same_function` for all that a model returns on the batch of ``case``."""
    inputs = case.inputs()
    assert_same_function(stock, lambda model: outputs(model, inputs), **options)


def assert_same_function(
    stock: nn.Module, evaluate: Callable[[nn.Module], dict[str, Tensor]], **options
) -> None:
    """Asserts that in fp64 the fused model equals the oracle, and in fp32 its error is at most twice transformers'.

    Both in every tensor that ``evaluate`` names.
    """
    with true_fp64():
        oracle = evaluate(copy.deepcopy(stock).double())
        assert_close(evaluate(fused(stock, **options).double()), oracle, 1e-11)
    plain, ours = evaluate(stock), evaluate(fused(stock, **options))
    for name, expected in oracle.items():
        assert_within_error_bound(ours[name], expected, plain[name], name, floor_ulps=16)
