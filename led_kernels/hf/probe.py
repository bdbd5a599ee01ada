"""What the installed transformers computes, and whether ours computes the same: asked of tiny models, as users ask.

No name of an argument or a class answers these questions, only tokens, logits and hidden states do.
"""

from __future__ import annotations

import enum
import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers import LEDConfig, LEDForConditionalGeneration, LongformerConfig, LongformerModel

from led_kernels.hf.classes import LED_DECODER, LED_ENCODER, LONGFORMER
from led_kernels.hf.shared import Options
from led_kernels.hf.swap import Table, swap

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
_CACHES: dict[str, dict[str, str]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class Decoder(enum.Enum):
    """Whose decoder generates the same tokens with a cache as without one; the values end a sentence."""

    STOCK = "gives the same tokens with every cache that it serves, and stays"
    OURS = "fails or gives other tokens with some caches, and is replaced by ours, which does not"
    NEITHER = "gives other tokens with a static cache, and ours does not run there: static caches are refused"


@functools.cache
def right_decoder() -> Decoder:
    """Whose LED decoder is right in this release of transformers. Tried once for a process, in a second."""
    with _surroundings():
        stock = _tiny(LEDForConditionalGeneration, _led_config())
        truth = {name: _logits(stock, prompt, use_cache=False) for name, prompt in _PROMPTS.items()}
        by_stock = _answers(stock, truth).values()
        if all(by_stock):
            return Decoder.STOCK
        ours = _tiny(LEDForConditionalGeneration, _led_config())
        swap(ours, LED_DECODER, Options())
        if all(_answers(ours, truth).values()):
            return Decoder.OURS
        return Decoder.NEITHER if False in by_stock else Decoder.STOCK  # which raises where it is not right


@functools.cache
def encoder_difference(family: str) -> str | None:
    """How far our encoder of ``led`` or ``longformer`` is from this release's, in words; None when they agree."""
    table, model_class, config = _ENCODERS[family]
    with _surroundings():
        try:
            expected = _states(_tiny(model_class, config()), None)
            actual = _states(_tiny(model_class, config()), table)
        except Exception as error:  # whatever a release moved
            return f"fails there ({type(error).__name__}: {error})"
        worst = max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))
        return None if worst < 1e-3 else f"differs from it by {worst:.2g}"


def _answers(model: nn.Module, truth: dict[str, Tensor]) -> dict[tuple[str, str], bool | None]:
    """For each prompt and cache, whether generation is right; None where it raises."""
    answers: dict[tuple[str, str], bool | None] = {}
    for name, prompt in _PROMPTS.items():
        for cache, settings in _CACHES.items():
            try:
                logits = _logits(model, prompt, **settings)
            except Exception:  # whatever a release moved
                answers[name, cache] = None
            else:
                same = logits.shape == truth[name].shape and torch.allclose(logits, truth[name], atol=1e-3)
                answers[name, cache] = same
    return answers


def _logits(model: nn.Module, prompt: dict[str, Tensor], **settings) -> Tensor:
    """Of six greedy tokens: ``[6, batch, vocab_size]``."""
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


def _states(model: nn.Module, table: Table | None) -> list[Tensor]:
    """Hidden states and attentions of all layers; of padding nothing."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if table is not None:
        swap(model, table, Options(backend="reference"))
    output = encoder(**_DOCUMENTS, output_attentions=True, output_hidden_states=True)
    real = _DOCUMENTS["attention_mask"].bool()
    return [x[real] for x in output.hidden_states] + [x.transpose(1, 2)[real] for x in output.attentions]


def _tiny(model_class: type[nn.Module], config) -> nn.Module:
    model = model_class(config).eval()
    if any(parameter.is_meta for parameter in model.parameters()):  # accelerate's init_empty_weights
        model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # wide, so that no mistake is small
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
def _surroundings() -> Iterator[None]:
    """Whatever the caller has set, tiny models are built and run in fp32 on the CPU, quietly, without gradients."""
    dtype, log = torch.get_default_dtype(), transformers.utils.logging
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
