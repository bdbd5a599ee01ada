"""Fused banded (sliding-window) and global attention for Longformer-Encoder-Decoder models."""

from led_kernels.absorbed import absorbed_global_attention
from led_kernels.api import banded_attention, global_attention, longformer_attention
from led_kernels.dispatch import BackendUnavailable
from led_kernels.mask import LongformerMask

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "LongformerMask",
    "absorbed_global_attention",
    "banded_attention",
    "global_attention",
    "longformer_attention",
]
