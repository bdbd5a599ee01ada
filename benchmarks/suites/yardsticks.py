"""These cases show what the machine can do in plain PyTorch: a matrix product, a copy, the encoder's linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import FORWARD, Case
from benchmarks.harness.shapes import Shape


def yardstick_cases(shape: Shape, smoke: bool = False) -> tuple[Case, ...]:
    """Returns a product of square matrices and a copy, in the shape's dtype, large enough to keep its device busy."""
    if smoke:
        size, elements = 128, 2**16
    elif shape.device == "cpu":
        size, elements = 2048, 2**26
    else:
        size, elements = 8192, 2**28
    new = {"dtype": shape.torch_dtype, "device": shape.device}
    itemsize = shape.torch_dtype.itemsize
    return (
        Case(
            "mm", "torch.mm", FORWARD, lambda _: matrix_product(size, **new), flop=2 * size**3,
            bytes=3 * itemsize * size**2,
        ),
        Case("copy", "torch.copy", FORWARD, lambda _: copy(elements, **new), bytes=2 * itemsize * elements),
    )  # fmt: skip


def linears_case() -> Case:
    return Case("linears", "torch.nn", FORWARD, encoder_linears)


def matrix_product(
    size: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Callable[[], dict[str, Tensor]]:
    """Returns ``torch.mm`` of two ``[size, size]`` matrices: the rate of operations for comparison."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: {"out": torch.mm(a, b)}


def copy(
    elements: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Callable[[], dict[str, Tensor]]:
    """Returns a copy between existing buffers, each element read once and written once: the rate of bytes."""
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return lambda: {"out": target.copy_(source)}


def encoder_linears(shape: Shape) -> Callable[[], dict[str, Tensor]]:
    """Returns query, key, value, output, fc1, GELU, fc2 of every layer, nothing else: the floor of an encoder's time.

    Each module gets an input of its real size; the products are not chained, since only their time counts.
    """
    d_model, ffn_dim = shape.d_model, shape.ffn_dim
    query, key, value, output = (nn.Linear(d_model, d_model) for _ in range(4))
    fc1, gelu, fc2 = nn.Linear(d_model, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, d_model)
    hidden = torch.randn(1, shape.seqlen, d_model, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        for _ in range(shape.layers):
            for module in (query, key, value, output):
                module(hidden)
            out = fc2(gelu(fc1(hidden)))
        return {"out": out}

    return call
