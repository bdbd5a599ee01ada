"""Counts what a training step keeps in memory, to choose whether layers are computed twice instead."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from led_model.config import LEDConfig
from led_model.modeling.model import LEDForConditionalGeneration

_SHARE = 0.8  # of the free memory that activations may take, as not all of it is in one piece
# A layer keeps so many numbers for each token, in units of d_model, beside those of its FFN.
_ENCODER, _DECODER = 6, 11
# These are bytes in units of d_model, in float32 whatever is computed in: of a decoder's layer for each token to write
# and, as keys and values, for each one to read, and of what is around the layers.
_DECODER_FLOAT32, _CROSS, _AROUND = 16, 8, 12
_PER_PARAMETER = 16  # bytes: a weight, its gradient and AdamW's two moments, in float32
_PER_SMOOTHED = 8  # bytes a logit more that label smoothing keeps: its log-softmax and that one's gradient


def activation_bytes(
    config: LEDConfig, sources: int, targets: int, dtype: torch.dtype, checkpointing: bool, smoothing: bool
) -> int:
    """Returns about how many bytes a step keeps for its backward.

    Args:
        sources, targets: tokens of a batch, padding included where there is any.
        dtype: that layers compute in.
        checkpointing: whether layers are computed again.
        smoothing: whether labels are smoothed.
    """
    width, size = config.d_model, dtype.itemsize
    encoder_layer = sources * (_ENCODER * width + config.encoder_ffn_dim) * size
    decoder_layer = targets * (_DECODER * width + 2 * config.decoder_ffn_dim) * size
    decoder_layer += (targets * _DECODER_FLOAT32 + sources * _CROSS) * width
    if checkpointing:  # the inputs of all layers are kept, and all of one layer while it is computed again
        kept = (sources * config.encoder_layers + targets * config.decoder_layers) * width * 4
        kept += max(encoder_layer, decoder_layer)
    else:
        kept = config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    of_logit = size + (_PER_SMOOTHED if smoothing else 0)
    return kept + (sources + targets) * width * _AROUND + targets * config.vocab_size * of_logit


def model_bytes(parameters: int) -> int:
    """Returns the bytes of weights, gradients and the optimizer."""
    return parameters * _PER_PARAMETER


def count_parameters(config: LEDConfig) -> int:
    """Returns how many parameters a model has, each counted once."""
    with torch.device("meta"):
        return LEDForConditionalGeneration(config).num_parameters()


def free_bytes(device: str) -> int | None:
    """Returns how much memory is free on a device; ``None`` where nothing tells."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def has_room(activations: int, model: int, free: int | None) -> bool:
    """Returns whether a step that keeps ``activations`` fits into free memory; if nothing tells how much, it does."""
    return free is None or activations <= _SHARE * (free - model)
