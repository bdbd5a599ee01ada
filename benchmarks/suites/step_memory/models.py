"""Builds the models that are trained, with random weights, and the step itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.suites.encoder import DROP_IN, OWN, STOCK, own_model
from benchmarks.suites.step_memory.step import AUTOCAST, BF16, Step

PROVIDERS = (STOCK, DROP_IN, OWN)


def build(provider: str, step: Step) -> nn.Module:
    """Builds one of :data:`PROVIDERS`, in training mode."""
    from transformers import LEDConfig, LEDForConditionalGeneration

    sizes = step.sizes
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_ffn_dim=sizes.ffn_dim,
        decoder_ffn_dim=sizes.ffn_dim,
        attention_window=2 * sizes.window,
        max_encoder_position_embeddings=sizes.max_source,
        max_decoder_position_embeddings=sizes.max_target,
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = LEDForConditionalGeneration(config)
    if provider == OWN:
        model = own_model(model)
    elif provider == DROP_IN:
        from led_kernels.hf import apply_led_kernels

        apply_led_kernels(model)
    if step.precision == BF16:
        model = model.to(torch.bfloat16)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def forward_of(model: nn.Module, step: Step) -> Callable[[], object]:
    """Returns the call of one training forward, whose result has a ``loss``."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (
        torch.randint(4, step.sizes.vocab_size, (step.batch, length), generator=generator)
        for length in (step.source, step.target)
    )
    global_attention_mask = torch.zeros_like(ids)
    global_attention_mask[:, : step.num_globals] = 1
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "global_attention_mask": global_attention_mask,
        "labels": labels,
    }

    def forward() -> object:
        is_autocast = step.precision == AUTOCAST
        with torch.autocast("cpu", torch.bfloat16) if is_autocast else contextlib.nullcontext():
            return model(**batch)

    return forward
