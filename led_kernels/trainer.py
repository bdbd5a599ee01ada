"""Tells transformers' Trainer, without importing it, how a model normalizes its loss."""

from __future__ import annotations

import inspect
import sys
from typing import Any


class AcceptsNumItems:
    """Says as ``accepts_loss_kwargs`` of a class whether transformers' Trainer shall give ``num_items_in_batch``.

    It then adds up the losses of accumulated batches and of processes as they are. Releases whose label smoothing does
    not divide by the number would add up means, so that there the answer is no; then Trainer gives no number, and
    divides the sum of the means. A model may have another answer as an attribute of its own.
    """

    def __get__(self, model: Any, model_class: type) -> bool:
        # A Trainer that asks has imported its label smoother.
        smoother = getattr(sys.modules.get("transformers.trainer_pt_utils"), "LabelSmoother", None)
        return smoother is None or "num_items_in_batch" in inspect.signature(smoother.__call__).parameters
