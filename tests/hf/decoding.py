"""The tests of decoding share a model of LED that generates more than one token, and its generation in fp64."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_cases import HFCase, true_fp64
from torch import Tensor, nn
from transformers import LEDForConditionalGeneration

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
has_decoder_of_ours = pytest.mark.skipif(
    VERSION < (4, 56), reason="before 4.56 LED has no static cache and keeps its decoder"
)
CASE = HFCase(globals_per_row=((0, 9), (4,)), padding=("none", "right"))
STEPS = 12
STATIC = {"cache_implementation": "static"}


def decoding_model(seed: int = 2, **overrides) -> nn.Module:
    """Builds a model that generates more than one token: its weights are large, its biases zero, and it is in fp64.

    In fp32 it would be ill-conditioned.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    model = LEDForConditionalGeneration(CASE.led_config(**sizes | overrides)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.get_decoder().embed_positions.weight.data *= 3
    return model.double()


def generate(model: nn.Module, **settings) -> tuple[Tensor, Tensor | None]:
    """Returns tokens and, but for beams, the logits ``[batch, steps, vocabulary]`` behind them."""
    # The seed is set after the encoder, whose layers draw a random number each in transformers up to 5.0.
    seeding = model.get_encoder().register_forward_hook(lambda *_: torch.manual_seed(0) and None)
    settings = {"do_sample": False, "max_new_tokens": STEPS} | settings
    with true_fp64():
        result = model.generate(**CASE.inputs(), **settings, output_logits=True, return_dict_in_generate=True)
    seeding.remove()
    return result.sequences, None if "num_beams" in settings else torch.stack(result.logits, 1)
