"""Tiny models show what the installed transformers computes, and whether the fused classes compute the same.

They are run as users run theirs: tokens, logits and hidden states are compared, not names of arguments or classes.
"""

from __future__ import annotations

import enum
import functools
import logging
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LEDConfig, LEDForConditionalGeneration, LongformerConfig, LongformerModel
from transformers.utils import logging as transformers_logging

from led_kernels.hf.classes import LED_DECODER, LED_ENCODER, LONGFORMER
from led_kernels.hf.shared import Options
from led_kernels.hf.swap import ClassTable, swap

_Model = TypeVar("_Model", bound=nn.Module)

_DOCUMENTS = {
    "input_ids": torch.tensor([[5, 9, 14, 7, 11, 23], [6, 8, 21, 17, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    "global_attention_mask": torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]),
}
_PROMPTS: dict[str, dict[str, Tensor]] = {
    "no prompt": {},
    "padded prompt": {
        "decoder_input_ids": torch.tensor([[2, 7, 9], [1, 2, 8]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
    },
}
_CACHE_SETTINGS: tuple[dict[str, str], ...] = ({}, {"cache_implementation": "static"})  # dynamic and static


class Decoder(enum.Enum):
    """Names the decoder that generates the same tokens with a cache as without one; the values end a sentence."""

    STOCK = "gives the same tokens with every cache that it serves, and stays, as ours does not run there"
    FUSED = "is replaced by ours, which gives the same tokens with every cache that it serves"
    NEITHER = "gives other tokens with a static cache, and ours does not run there: static caches are refused"


@functools.cache
def right_decoder() -> Decoder:
    """Finds out which LED decoder is right in this release of transformers, once for a process, in a second."""
    with _neutral_settings():
        stock = _tiny_model(LEDForConditionalGeneration, _led_config())
        expected = {name: _logits(stock, prompt, use_cache=False) for name, prompt in _PROMPTS.items()}
        by_stock = _are_right(stock, expected)
        fused = _tiny_model(LEDForConditionalGeneration, _led_config())
        swap(fused, LED_DECODER, Options())
        by_fused = _are_right(fused, expected)
        # It keeps no [heads, target, source] for the backward, and so is preferred where both are right.
        if all(
            ours or (ours is None and not theirs) for ours, theirs in zip(by_fused, by_stock, strict=True)
        ):
            return Decoder.FUSED
        # Where the stock decoder raises instead of giving other tokens, nothing has to be refused.
        return Decoder.NEITHER if False in by_stock else Decoder.STOCK


@functools.cache
def encoder_difference(family: str) -> str | None:
    """Says how far the fused encoder of ``led`` or ``longformer`` is from this release's; None when they agree."""
    table, model_class, config = _ENCODERS[family]
    with _neutral_settings():
        try:
            expected = _layer_outputs(_tiny_model(model_class, config()), None)
            actual = _layer_outputs(_tiny_model(model_class, config()), table)
        except Exception as error:  # A release may have changed anything.
            return f"fails there ({type(error).__name__}: {error})"
        worst = max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))
        return None if worst < 1e-3 else f"differs from it by {worst:.2g}"


def _are_right(model: LEDForConditionalGeneration, expected: dict[str, Tensor]) -> list[bool | None]:
    """Returns whether generation is right, for each prompt and each cache; None where it raises."""
    results: list[bool | None] = []
    for name, prompt in _PROMPTS.items():
        for settings in _CACHE_SETTINGS:
            try:
                logits = _logits(model, prompt, **settings)
            except Exception:  # A release may have changed anything.
                results.append(None)
            else:
                is_same_shape = logits.shape == expected[name].shape
                results.append(is_same_shape and torch.allclose(logits, expected[name], atol=1e-3))
    return results


def _logits(model: LEDForConditionalGeneration, prompt: dict[str, Tensor], **settings) -> Tensor:
    """Returns the logits of six greedy tokens, ``[6, batch, vocab_size]``."""
    result = model.generate(
        **_DOCUMENTS,
        **prompt,
        **settings,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(result.logits)


def _layer_outputs(
    model: LEDForConditionalGeneration | LongformerModel, table: ClassTable | None
) -> list[Tensor]:
    """Returns hidden states and attentions of all layers, without the rows of padding.

    ``table`` replaces classes of the model first, if it is given.
    """
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if table is not None:
        swap(model, table, Options(backend="reference"))
    output = encoder(**_DOCUMENTS, output_attentions=True, output_hidden_states=True)
    is_token = _DOCUMENTS["attention_mask"].bool()
    attentions = [x.transpose(1, 2)[is_token] for x in output.attentions]
    return [x[is_token] for x in output.hidden_states] + attentions


def _tiny_model(model_class: type[_Model], config) -> _Model:
    """Builds a model on the CPU whose weights are the same at every call."""
    model = model_class(config).eval()
    if any(parameter.is_meta for parameter in model.parameters()):  # accelerate's init_empty_weights
        model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # Wide weights keep mistakes from being small.
        nn.init.normal_(parameter, std=0.3, generator=generator)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.zeros_(buffer)
    return model


def _led_config() -> LEDConfig:
    return LEDConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        attention_window=4,
        max_encoder_position_embeddings=16,
        max_decoder_position_embeddings=16,
        dropout=0.0,
        pad_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=2,
    )


def _longformer_config() -> LongformerConfig:
    return LongformerConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        attention_window=4,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
    )


_ENCODERS = {
    "led": (LED_ENCODER, LEDForConditionalGeneration, _led_config),
    "longformer": (LONGFORMER, LongformerModel, _longformer_config),
}


@contextmanager
def _neutral_settings() -> Generator[None]:
    """Makes tiny models be built and run in fp32 on the CPU, quietly and without gradients, whatever the caller set."""
    dtype, log = torch.get_default_dtype(), transformers_logging
    verbosity = log.get_verbosity()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(log.set_verbosity, verbosity)
        torch.set_default_dtype(torch.float32)
        log.set_verbosity(logging.CRITICAL)
        for context in (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        yield
