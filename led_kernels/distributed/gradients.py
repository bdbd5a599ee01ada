"""Averages the gradients of a model over ranks that compute parts of the same documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

_BUCKET_BYTES = 2**25  # of gradients that are sent at once


class AveragedGradients:
    """Averages all gradients of a model over ``group`` at the end of every backward through it.

    It waits until the engine has nothing else to do: then DistributedDataParallel and FSDP2, which reduce over another
    group, have finished. What they have sharded is averaged as it is, as ranks of this group have the same shards.

    An average of averages of equally many gradients is the average of all, so that it does no harm where they reduce
    over this group, too, nor where gradients of several backwards are added.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.model = model
        self.group = group
        self._queued_in: int | None = None  # the backward at whose end the gradients are to be averaged

    def watch(self, output: Tensor) -> None:
        """Averages after a backward that goes through ``output``, which the same calls have made on all ranks."""
        if output.requires_grad:
            output.register_hook(self._queue)

    def _queue(self, gradient: Tensor) -> None:
        # A backward that raises drops what was queued, so that the next has to queue it again.
        if self._queued_in != (backward := torch._C._current_graph_task_id()):
            self._queued_in = backward
            Variable._execution_engine.queue_callback(self._queue_again)

    def _queue_again(self) -> None:
        # Others may have queued theirs in the meantime; those run before what is queued now.
        Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued_in = None
        bucket: list[Tensor] = []
        for parameter in self.model.parameters():
            if parameter.grad is None:
                continue
            grad: Any = parameter.grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
            if bucket and (grad.dtype != bucket[0].dtype or _nbytes([*bucket, grad]) > _BUCKET_BYTES):
                self._average_bucket(bucket)
                bucket = []
            bucket.append(grad)
        if bucket:
            self._average_bucket(bucket)

    def _average_bucket(self, grads: list[Tensor]) -> None:
        flat = torch.cat([grad.flatten() for grad in grads])
        flat /= dist.get_world_size(self.group)  # before the sum, which could overflow
        dist.all_reduce(flat, group=self.group)
        for grad, averaged in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(averaged.view_as(grad))


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
