"""The providers of an encoder of led-base's shape: stock transformers, the same with the drop-in, led_model.

All hold the same seeded random weights; the vocabulary and the decoder are cut down, since neither is
measured. A timed call starts at token ids and masks, so that each pays for what it makes of its masks once
per forward.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness.shapes import Shape

VOCAB_SIZE = 1000
STOCK, DROP_IN, OWN = "transformers", "transformers + led_kernels", "led_model"

# input_ids, attention_mask, global_attention_mask, each [1, seqlen] -> hidden states [1, seqlen, d_model]
Encode = Callable[[Tensor, Tensor, Tensor], Tensor]


def prepare(build: Callable[[Shape], Encode], shape: Shape) -> Callable[[], dict[str, Tensor]]:
    """The call that is timed."""
    encode, arguments = build(shape), make_arguments(shape)
    return lambda: {"out": encode(*arguments)}


def make_arguments(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask (no padding) and global_attention_mask, each ``[1, seqlen]``."""
    ids = torch.randint(4, VOCAB_SIZE, (1, shape.seqlen), generator=torch.Generator().manual_seed(0))
    global_attention_mask = torch.zeros_like(ids)
    global_attention_mask[:, list(shape.global_index)] = 1
    return ids, torch.ones_like(ids), global_attention_mask


def stock_model(shape: Shape, **settings: int) -> nn.Module:
    """transformers' LED with seeded weights, wide enough (std 0.05) that attention is far from uniform.

    ``settings`` replace those of the config that concern the vocabulary and the decoder.
    """
    from transformers import LEDConfig, LEDForConditionalGeneration

    config = dict(
        vocab_size=VOCAB_SIZE,
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn_dim,
        decoder_layers=1,
        decoder_attention_heads=shape.heads,
        decoder_ffn_dim=shape.ffn_dim,
        attention_window=[2 * shape.window] * shape.layers,
        max_encoder_position_embeddings=shape.seqlen,
        max_decoder_position_embeddings=64,
        init_std=0.05,
    )
    torch.manual_seed(0)
    return LEDForConditionalGeneration(LEDConfig(**config | settings)).eval()


def own_model(stock: nn.Module) -> nn.Module:
    """led_model's with the weights of transformers'."""
    from led_model import LEDForConditionalGeneration

    with tempfile.TemporaryDirectory() as directory:
        stock.save_pretrained(directory)
        return LEDForConditionalGeneration.from_pretrained(directory)


def encode_with(model: nn.Module) -> Encode:
    """The encoder of a transformers model, stock or patched."""
    encoder = model.get_encoder()

    @torch.no_grad()
    def encode(ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
        result = encoder(
            input_ids=ids, attention_mask=attention_mask, global_attention_mask=global_attention_mask
        )
        return result.last_hidden_state

    return encode


def _build_stock(shape: Shape) -> Encode:
    return encode_with(stock_model(shape))


def _build_drop_in(shape: Shape) -> Encode:
    from led_kernels.hf import apply_led_kernels

    model = stock_model(shape)
    apply_led_kernels(model)
    return encode_with(model)


def _build_own(shape: Shape) -> Encode:
    return torch.no_grad()(own_model(stock_model(shape)).led.encode)


PROVIDERS: dict[str, Callable[[Shape], Encode]] = {
    OWN: _build_own,
    DROP_IN: _build_drop_in,
    STOCK: _build_stock,
}


def shortest(shape: Shape) -> Shape:
    """One whole window: the fewest tokens that stock transformers takes without padding them."""
    return replace(shape, seqlen=2 * shape.window)
