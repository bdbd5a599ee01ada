"""The sizes of a model and of the batch that it is trained on stand here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP32, BF16, AUTOCAST = "fp32", "bf16", "bf16 autocast"
"""All in fp32; all in bf16; weights in fp32 and products in bf16, as Trainer's ``bf16=True`` has them."""


@dataclass(frozen=True)
class Sizes:
    """Holds the numbers of a config. ``window`` is one-sided, half of transformers' ``attention_window``."""

    d_model: int = 768
    heads: int = 12
    ffn_dim: int = 3072
    encoder_layers: int = 6
    decoder_layers: int = 6
    vocab_size: int = 50265
    window: int = 512
    max_source: int = 16384
    max_target: int = 1024

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def table(self) -> int:
        """Returns the numbers in the table of the vocabulary, which embeddings and head share."""
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """Returns the numbers in all weights."""
        d_model, norm = self.d_model, 2 * self.d_model
        projection = d_model**2 + d_model
        feed_forward = 2 * d_model * self.ffn_dim + self.ffn_dim + d_model
        positions = (self.max_source + self.max_target) * d_model
        encoder_layer = 7 * projection + feed_forward + 2 * norm
        decoder_layer = 8 * projection + feed_forward + 3 * norm
        layers = self.encoder_layers * encoder_layer + self.decoder_layers * decoder_layer
        return self.table + positions + 2 * norm + layers


LED_BASE = Sizes()
LED_LARGE = Sizes(d_model=1024, heads=16, ffn_dim=4096, encoder_layers=12, decoder_layers=12)


@dataclass(frozen=True)
class Step:
    """Holds one forward and backward: a batch without padding, its first ``num_globals`` tokens global.

    Dropout is 0.1, that of attention and activation 0, as in the released checkpoints. ``device`` is ``cpu`` or
    ``cuda``, where a mask of dropout is bool; on the CPU it is the factors, in the dtype of what they multiply.
    """

    sizes: Sizes
    source: int
    target: int
    batch: int = 1
    num_globals: int = 1
    precision: str = FP32
    checkpointing: bool = False
    device: str = "cpu"

    @property
    def unit(self) -> int:
        """Returns the bytes of one tensor ``[batch, source, d_model]`` in the dtype that products are computed in."""
        return self.batch * self.source * self.sizes.d_model * self.compute_dtype.itemsize

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == FP32 else torch.bfloat16

    @property
    def itemsize(self) -> int:
        """Returns the bytes of a number in :attr:`compute_dtype`."""
        return self.compute_dtype.itemsize

    @property
    def weight_itemsize(self) -> int:
        return 2 if self.precision == BF16 else 4

    @property
    def residual_itemsize(self) -> int:
        """Returns the bytes of a number between the layers, which autocast leaves in the dtype of the weights."""
        return self.weight_itemsize
