"""The memory of a training step is predicted here from the sizes of model and batch: sums of named tensors, no fit."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.suites.encoder import STOCK
from benchmarks.suites.step_memory import ours, stock
from benchmarks.suites.step_memory.parts import Named, Part
from benchmarks.suites.step_memory.step import Step


@dataclass(frozen=True)
class Prediction:
    """Holds the bytes of one step at its fullest moment.

    Attributes:
        weights, gradients, optimizer: of all parameters; AdamW has two numbers for each.
        activations: all else.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def kept(provider: str, step: Step) -> list[Named]:
    """Returns what is kept from the forward to the backward, weights aside."""
    return [tensor for part in _parts(provider, step) for tensor in part.held]


def predict(provider: str, step: Step) -> Prediction:
    """Predicts a step whose gradients are there from its beginning, as under accumulation."""
    weights = step.sizes.parameters * step.weight_itemsize
    held, fullest = 0, 0
    for part in _parts(provider, step):
        at_work = held + _nbytes(part.fullest)
        is_in_backward = part.at_fullest is None or part.is_recomputed
        if is_in_backward:  # The head's gradient waits for those of the embeddings, whose table is the same.
            at_work += step.sizes.table * step.weight_itemsize
        fullest = max(fullest, at_work)
        held += _nbytes(part.held)
    return Prediction(weights, weights, 2 * weights, fullest)


def _parts(provider: str, step: Step) -> list[Part]:
    return stock.parts(step) if provider == STOCK else ours.parts(provider, step)


def _nbytes(tensors: list[Named]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
