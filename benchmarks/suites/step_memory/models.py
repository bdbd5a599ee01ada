"""Builds the models that are trained, with random weights, and the step itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness.shapes import Shape
from benchmarks.suites.encoder import DROP_IN, OWN, STOCK, own_model, stock_model
from benchmarks.suites.step_memory.step import AUTOCAST, BF16, Step

PROVIDERS = (STOCK, DROP_IN, OWN)


def build(provider: str, step: Step) -> nn.Module:
    """Builds one of :data:`PROVIDERS`, in training mode, with the dropout of released checkpoints."""
    sizes = step.sizes
    shape = Shape(
        seqlen=sizes.max_source, heads=sizes.heads, head_dim=sizes.head_dim, window=sizes.window,
        layers=sizes.encoder_layers, ffn_dim=sizes.ffn_dim,
    )  # fmt: skip
    model = stock_model(
        shape, vocab_size=sizes.vocab_size, decoder_layers=sizes.decoder_layers,
        max_decoder_position_embeddings=sizes.max_target, init_std=0.02,
    )  # fmt: skip
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
