"""Adds products up in a wider dtype than that of their factors."""

from __future__ import annotations

from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a @ b`` to ``total``, which may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
