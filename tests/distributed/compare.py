"""Measures how far the loss and the gradients of a step are from others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def relative_differences(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns how far a ``"loss"`` and gradients are from fp64's, in units of the largest number of each.

    The unit of a gradient is at least a thousandth of the largest gradient. One that has to be 0, such as that of a
    key's bias, sums numbers up to the size of the loss, a thousandth of which is its unit.
    """
    assert found.keys() == reference.keys(), found.keys() ^ reference.keys()
    sizes = {name: x.abs().max().item() for name, x in reference.items()}
    largest = max(sizes.values())
    least = 1e-3 * max(size for name, size in sizes.items() if name != "loss")
    return {
        name: (found[name].double() - reference[name].double()).abs().max().item()
        / (1e-3 * largest if size < 1e-7 * largest else max(size, least))
        for name, size in sizes.items()
    }
