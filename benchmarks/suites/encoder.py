"""This suite measures time and memory of led-base's encoder: transformers, the same with the drop-in, led_model.

All hold the same seeded random weights; the vocabulary and the decoder are cut down, since neither is
measured. A timed call starts at token ids and masks, so that each pays for what it makes of its masks once
per forward.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import FORWARD, Case, Group, MemoryCase
from benchmarks.harness.figures import Figure, Run, ratio, seqlen_of
from benchmarks.harness.shapes import SMOKE, Shape
from benchmarks.harness.suite import Suite
from benchmarks.suites.yardsticks import linears_case, yardstick_cases

VOCAB_SIZE = 1000
STOCK, DROP_IN, OWN = "transformers", "transformers + led_kernels", "led_model"

# input_ids, attention_mask, global_attention_mask, each [1, seqlen] -> hidden states [1, seqlen, d_model]
Encode = Callable[[Tensor, Tensor, Tensor], Tensor]


def groups(smoke: bool = False) -> list[Group]:
    shape = SMOKE if smoke else Shape()
    cases = [linears_case(), *(encoder_case(name, build) for name, build in PROVIDERS.items())]
    # each is a fresh process that imports transformers, which is most of what a smoke run spends
    measured = (OWN, STOCK) if smoke else PROVIDERS
    memory = tuple(memory_case(name, PROVIDERS[name]) for name in measured)
    return [Group(f"encoder_{shape.seqlen}", shape, (*yardstick_cases(shape, smoke), *cases), memory)]


def encoder_case(provider: str, build: Callable[[Shape], Encode]) -> Case:
    """Returns the case of a forward, compared with stock transformers in fp64."""
    return Case("encoder", provider, FORWARD, functools.partial(_prepare, build), truth)


def memory_case(provider: str, build: Callable[[Shape], Encode]) -> MemoryCase:
    return MemoryCase(provider, functools.partial(_prepare_memory, build))


@functools.lru_cache(maxsize=1)
def truth(shape: Shape) -> dict[str, Tensor]:
    encode = encode_with(stock_model(shape).double())
    return {"out": encode(*make_arguments(shape))}


def _prepare(build: Callable[[Shape], Encode], shape: Shape) -> Callable[[], dict[str, Tensor]]:
    encode, arguments = build(shape), make_arguments(shape)
    return lambda: {"out": encode(*arguments)}


def _prepare_memory(
    build: Callable[[Shape], Encode], shape: Shape
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    encode = build(shape)
    return lambda: encode(*make_arguments(shortest(shape))), lambda: encode(*make_arguments(shape))


def make_arguments(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Makes input_ids, attention_mask (no padding) and global_attention_mask, each ``[1, seqlen]``."""
    ids = torch.randint(4, VOCAB_SIZE, (1, shape.seqlen), generator=torch.Generator().manual_seed(0))
    global_attention_mask = torch.zeros_like(ids)
    global_attention_mask[:, list(shape.global_index)] = 1
    return ids, torch.ones_like(ids), global_attention_mask


def config_of(shape: Shape) -> dict[str, Any]:
    """Returns what the config of either library is made of."""
    return {
        "vocab_size": VOCAB_SIZE,
        "d_model": shape.d_model,
        "encoder_layers": shape.layers,
        "encoder_attention_heads": shape.heads,
        "encoder_ffn_dim": shape.ffn_dim,
        "decoder_layers": 1,
        "decoder_attention_heads": shape.heads,
        "decoder_ffn_dim": shape.ffn_dim,
        "attention_window": [2 * shape.window] * shape.layers,
        "max_encoder_position_embeddings": shape.seqlen,
        "max_decoder_position_embeddings": 64,
        "init_std": 0.05,
    }


def stock_model(shape: Shape, **settings: float) -> nn.Module:
    """Builds transformers' LED with seeded weights, wide enough (std 0.05) that attention is far from uniform.

    ``settings`` replace those of the config that concern the vocabulary, the decoder and the width of the weights.
    """
    from transformers import LEDConfig, LEDForConditionalGeneration

    torch.manual_seed(0)
    return LEDForConditionalGeneration(LEDConfig(**config_of(shape) | settings)).eval()


def own_model(stock: nn.Module) -> nn.Module:
    """Builds led_model's LED with the weights of transformers'."""
    from led_model import LEDForConditionalGeneration

    with tempfile.TemporaryDirectory() as directory:
        stock.save_pretrained(directory)
        return LEDForConditionalGeneration.from_pretrained(directory)


def encode_with(model: nn.Module) -> Encode:
    """Returns a call of the encoder of a transformers model, stock or patched."""
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
    """Returns one whole window: the fewest tokens that stock transformers takes without padding them."""
    return replace(shape, seqlen=2 * shape.window)


def figures(run: Run) -> Iterator[Figure]:
    for group in run.groups("encoder"):
        seqlen = seqlen_of(group)
        stock, linears = run.row(group, "encoder", STOCK), run.row(group, "linears", "torch.nn")
        stock_peak = run.row(group, "memory", STOCK)
        for provider in (OWN, DROP_IN):
            name, encoder = f"encoder ({provider})", run.row(group, "encoder", provider)
            peak = ratio(run.row(group, "memory", provider), stock_peak, "peak_mib")
            yield Figure(
                f"{name}, time ÷ its linear layers alone",
                seqlen,
                1.35,
                ratio(encoder, linears),
                is_limit=True,
            )
            yield Figure(f"{name} vs transformers", seqlen, 3.0, ratio(stock, encoder), unit=" ×")
            yield Figure(f"{name}, peak memory ÷ transformers'", seqlen, 0.25, peak, is_limit=True)


SUITE = Suite("encoder", "an encoder of led-base's shape and its peak memory", groups, figures)
