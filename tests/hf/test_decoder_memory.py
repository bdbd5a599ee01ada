"""The decoder keeps no attention probabilities and no causal mask for the backward."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
from decoding import VERSION
from transformers import LEDConfig
from transformers.models.led.modeling_led import LEDDecoder

from benchmarks.harness.saved_tensors import saved_tensors
from led_kernels.hf import apply_led_kernels
from led_kernels.hf.led_decoder import FusedLEDDecoder

TARGET, SOURCE, D_MODEL = 1024, 4096, 768


def kept_bytes(decoder: LEDDecoder) -> int:
    """Returns how much memory a forward keeps for the backward beside the parameters."""

    def forward() -> torch.Tensor:
        states = decoder(
            input_ids=torch.randint(3, 99, (1, TARGET)),
            encoder_hidden_states=torch.randn(1, SOURCE, D_MODEL, requires_grad=True),
            encoder_attention_mask=(torch.arange(SOURCE) < SOURCE - 96).long()[None],
            use_cache=False,
        )
        assert states[0].shape == (1, TARGET, D_MODEL)
        return states[0]

    return sum(saved.nbytes for saved in saved_tensors(decoder, forward))


def test_decoder_of_led_base_keeps_190_mib_at_1024_times_4096():
    config = LEDConfig(
        vocab_size=100,
        d_model=D_MODEL,
        decoder_layers=2,
        decoder_attention_heads=12,
        decoder_ffn_dim=3072,
        dropout=0.0,
    )
    decoder = apply_led_kernels(LEDDecoder(config)).train()
    if VERSION < (4, 56):  # where ours does not run
        assert type(decoder) is LEDDecoder
    else:
        assert isinstance(decoder, FusedLEDDecoder)
        assert kept_bytes(decoder) <= 190 * 2**20
