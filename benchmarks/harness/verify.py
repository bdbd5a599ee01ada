"""The gate: no time is taken of a provider whose result is wrong.

Attention is compared with the definition in fp64, row by row over exactly the keys that a row may see, at the
shape that is timed. It shares no code with any provider. Encoders are compared with stock transformers in
fp64.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.harness.shapes import Shape
from benchmarks.suites import attention, encoder, generation

# Largest difference allowed, relative to the largest value of the tensor. fp32 comes out below 1e-5; one key
# too many or too few in a window of 1,025 shows as 1e-3. That is less than the rounding of bf16, whose gate is against
# gross errors: pytest --gpu looks closer.
TOLERANCE = 1e-4
TOLERANCES = {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.int64: 0.0}
BLOCK = 256  # queries at a time


class GateError(Exception):
    """A provider's result differs from the truth."""


def check(name: str, result: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference of ``result`` from ``truth``, relative to each tensor's largest value.

    Rows that are NaN in the truth are nobody's to define and not compared.

    Raises:
        GateError: when it exceeds its dtype's tolerance, or a tensor is missing or of another shape.
    """
    error = 0.0
    for key, actual in result.items():
        if key not in truth or truth[key].shape != actual.shape:
            raise GateError(f"{name}: {key} {tuple(actual.shape)} is not what the truth holds")
        expected, tolerance = truth[key], TOLERANCES[actual.dtype]
        defined = ~expected.isnan()
        difference = (actual.double() - expected)[defined].abs().max() / expected[defined].abs().max()
        if not difference <= tolerance:  # a NaN fails too
            raise GateError(
                f"{name}: {key} is off by {difference:.2e} of its largest value ({tolerance:.0e} allowed)"
            )
        error = max(error, float(difference))
    return error


@functools.lru_cache(maxsize=2)
def truth_of(what: str, shape: Shape) -> dict[str, Tensor] | None:
    """What a case's result must be, in fp64, or None for the yardsticks, whose result is not looked at."""
    if what in generation.SEARCHES:
        return generation.tokens_of(what, shape)
    if what == "encoder":
        encode = encoder.encode_with(encoder.stock_model(shape).double())
        return {"out": encode(*encoder.make_arguments(shape))}
    if what in attention.LEAVES:
        inputs = attention.make_inputs(shape)
        truth = _banded(inputs)
        return _with_global_rows(inputs, truth) if what == "core" else truth
    return None


def _banded(inputs: attention.Inputs) -> dict[str, Tensor]:
    """out, dq, dk, dv of the local rows; a global row's out is NaN here, which is to say undefined."""
    shape = inputs.shape
    rows = torch.tensor([i for i in range(shape.seqlen) if i not in shape.global_index], device=shape.device)
    columns = torch.tensor(shape.global_index, dtype=torch.int64, device=shape.device)
    truth = _empty(inputs, ("q", "k", "v"))
    for block in rows.split(BLOCK):
        key = torch.arange(
            max(0, int(block[0]) - shape.window),
            min(shape.seqlen, int(block[-1]) + shape.window + 1),
            device=shape.device,
        )
        key = torch.cat([key, columns]).unique()
        allowed = ((block[:, None] - key).abs() <= shape.window) | torch.isin(key, columns)
        _attend(inputs, truth, ("q", "k", "v"), block, key, allowed)
    truth["out"][:, columns] = float("nan")
    return truth


def _with_global_rows(inputs: attention.Inputs, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the global rows' own attention over every token, and its gradients."""
    leaves = ("q_global", "k_global", "v_global")
    rows = torch.tensor(inputs.shape.global_index, dtype=torch.int64, device=inputs.shape.device)
    key = torch.arange(inputs.shape.seqlen, device=inputs.shape.device)
    truth = {**_empty(inputs, leaves), **truth, "out": truth["out"].nan_to_num()}
    _attend(inputs, truth, leaves, rows, key, key.new_ones(len(rows), len(key), dtype=torch.bool))
    return truth


def _empty(inputs: attention.Inputs, leaves: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = {f"d{name}": torch.zeros_like(inputs.d_out, dtype=torch.float64) for name in leaves}
    return {"out": torch.zeros_like(inputs.d_out, dtype=torch.float64), **tensors}


def _attend(
    inputs: attention.Inputs,
    truth: dict[str, Tensor],
    leaves: tuple[str, ...],
    rows: Tensor,
    key: Tensor,
    allowed: Tensor,
) -> None:
    """softmax(q kᵀ / √head_dim where allowed) v for some rows, into ``truth``; its gradients add up there."""
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
