"""Tile sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose(kernel: str, dtype: torch.dtype, head_dim: int) -> TileConfig:
    c = os.environ.get("CFG", "128,128,8,2")
    return TileConfig(*map(int, c.split(",")))


def sums_by_dot(dtype: torch.dtype) -> bool:
    return os.environ.get("SUM", "1") == "1" and dtype != torch.float32
