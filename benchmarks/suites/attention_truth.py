"""The inputs of one attention layer are made here, and what must come out of it: the definition in fp64.

It is computed row by row over exactly the keys that a row may see, at the shape that is timed, and shares no code with
any provider.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.shapes import Shape
from led_kernels import LongformerMask

LEAVES = {"banded": ("q", "k", "v"), "core": ("q", "k", "v", "q_global", "k_global", "v_global")}
BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class Inputs:
    """Holds the leaves and ``d_out``, each ``[1, seqlen, heads, head_dim]``."""

    shape: Shape
    tensors: dict[str, Tensor]
    d_out: Tensor
    mask: LongformerMask


@functools.lru_cache(maxsize=1)
def make_inputs(shape: Shape) -> Inputs:
    """Makes the same random numbers for every provider."""
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.seqlen, shape.heads, shape.head_dim)
    tensors = {
        name: torch.randn(size, generator=generator).to(shape.device, shape.torch_dtype)
        for name in (*LEAVES["core"], "d_out")
    }
    mask = LongformerMask.from_lengths([shape.seqlen], shape.seqlen, list(shape.global_index))
    return Inputs(shape, tensors, tensors.pop("d_out"), mask.to(shape.device))


@functools.lru_cache(maxsize=2)
def truth_of(what: str, shape: Shape) -> dict[str, Tensor]:
    """Computes out and the gradients of the leaves, of ``banded`` or ``core``."""
    inputs = make_inputs(shape)
    truth = _banded(inputs)
    return _with_global_rows(inputs, truth) if what == "core" else truth


def _banded(inputs: Inputs) -> dict[str, Tensor]:
    """Computes out, dq, dk, dv of the local rows; a global row's out is NaN here, which is to say undefined."""
    shape = inputs.shape
    rows = torch.tensor([i for i in range(shape.seqlen) if i not in shape.global_index], device=shape.device)
    global_index = torch.tensor(shape.global_index, dtype=torch.int64, device=shape.device)
    truth = _empty(inputs, ("q", "k", "v"))
    for block in rows.split(BLOCK):
        key = torch.arange(
            max(0, int(block[0]) - shape.window),
            min(shape.seqlen, int(block[-1]) + shape.window + 1),
            device=shape.device,
        )
        key = torch.cat([key, global_index]).unique()
        allowed = ((block[:, None] - key).abs() <= shape.window) | torch.isin(key, global_index)
        _attend(inputs, truth, ("q", "k", "v"), block, key, allowed)
    truth["out"][:, global_index] = float("nan")
    return truth


def _with_global_rows(inputs: Inputs, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Computes the same with the global rows' own attention over every token, and its gradients."""
    leaves = ("q_global", "k_global", "v_global")
    rows = torch.tensor(inputs.shape.global_index, dtype=torch.int64, device=inputs.shape.device)
    key = torch.arange(inputs.shape.seqlen, device=inputs.shape.device)
    truth = {**_empty(inputs, leaves), **truth, "out": truth["out"].nan_to_num()}
    _attend(inputs, truth, leaves, rows, key, key.new_ones(len(rows), len(key), dtype=torch.bool))
    return truth


def _empty(inputs: Inputs, leaves: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = {f"d{name}": torch.zeros_like(inputs.d_out, dtype=torch.float64) for name in leaves}
    return {"out": torch.zeros_like(inputs.d_out, dtype=torch.float64), **tensors}


def _attend(
    inputs: Inputs,
    truth: dict[str, Tensor],
    leaves: tuple[str, ...],
    rows: Tensor,
    key: Tensor,
    allowed: Tensor,
) -> None:
    """Puts softmax(q kᵀ / √head_dim where allowed) v for some rows into ``truth``; its gradients add up there."""
    q, k, v = (
        inputs.tensors[name][0, at].double().requires_grad_()
        for name, at in zip(leaves, (rows, key, key), strict=True)
    )
    scores = torch.einsum("ihd,jhd->hij", q, k) / inputs.shape.head_dim**0.5
    p = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    out = torch.einsum("hij,jhd->ihd", p, v)
    gradients = torch.autograd.grad(out, (q, k, v), inputs.d_out[0, rows].double())
    truth["out"][0, rows] = out.detach()
    for name, at, gradient in zip(leaves, (rows, key, key), gradients, strict=True):
        truth[f"d{name}"][0].index_add_(0, at, gradient)
