"""The sizes of a measurement stand here, with the operations and bytes that its attention cannot do without."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Holds the sizes, dtype and device of one attention layer and of the encoder built from it (batch 1, no padding).

    ``window`` is one-sided and inclusive: a query sees ``2 * window + 1`` keys and every token of
    ``global_index``.
    """

    seqlen: int = 4096
    heads: int = 12
    head_dim: int = 64
    window: int = 512
    global_index: tuple[int, ...] = (0,)
    layers: int = 6
    ffn_dim: int = 3072
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim


SMOKE = Shape(seqlen=256, heads=2, head_dim=16, window=32, layers=2, ffn_dim=64)


def attention_pairs(shape: Shape) -> int:
    """Counts (query, allowed key) pairs of the local queries in one head: the band, cut, and global keys."""
    query = torch.arange(shape.seqlen)
    pairs = (query + shape.window).clamp(max=shape.seqlen - 1) - (query - shape.window).clamp(min=0) + 1
    for position in shape.global_index:
        pairs += (query - position).abs() > shape.window
    pairs[list(shape.global_index)] = 0
    return int(pairs.sum())


def attention_flop(shape: Shape) -> int:
    """Counts the forward's operations: ``q·k`` and ``p·v`` are ``2 * head_dim`` operations each per pair."""
    return 4 * shape.head_dim * shape.heads * attention_pairs(shape)


def attention_bytes(shape: Shape) -> int:
    """Returns the size of one of q, k, v, out."""
    return shape.torch_dtype.itemsize * shape.seqlen * shape.d_model
