"""Says among which ranks sequences are split, and where."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from led_kernels.argument_checks import window_of
from led_kernels.distributed.gradients import AveragedGradients
from led_kernels.mask import LongformerMask
from led_kernels.mask_shard import MaskShard, check_bounds, even_bounds


@dataclass(frozen=True, eq=False)
class ContextParallelMask:
    """Is what layers get for a mask where sequences are split over the ranks of a group.

    Attributes:
        whole: the mask of the whole sequences, padded, the same on all ranks.
        group: the ranks; rank r of it has rows ``bounds[r]`` to ``bounds[r + 1]``.
        bounds: by default even parts.
    """

    whole: LongformerMask
    group: dist.ProcessGroup
    bounds: tuple[int, ...] = ()
    _shards: dict[tuple[int, int], MaskShard[LongformerMask]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        world = dist.get_world_size(self.group)
        if self.whole.is_packed:
            raise ValueError(
                "mask is of packed sequences, which context parallelism does not split; give padded ones, or deal "
                "whole documents to the ranks."
            )
        if self.bounds:
            check_bounds(self.bounds, world, self.whole.max_seqlen)
        else:
            object.__setattr__(self, "bounds", even_bounds(self.whole.max_seqlen, world))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def max_globals(self) -> int:
        return self.whole.max_globals

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def own(self) -> slice:
        """Returns which rows of the sequences are this rank's."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def shard(self, window_size: int | tuple[int, int]) -> MaskShard[LongformerMask]:
        """Returns this rank's part for a window, which is made once."""
        window = window_of(window_size, self.whole.max_seqlen)
        if window not in self._shards:
            self._shards[window] = self.whole.shard(
                self.rank, dist.get_world_size(self.group), window, bounds=self.bounds
            )
        return self._shards[window]


def even_part(seqlen: int, group: dist.ProcessGroup) -> slice:
    """Returns which rows of ``seqlen`` are this rank's, where the parts are even.

    Raises:
        ValueError: when a rank would have no rows.
    """
    bounds = even_bounds(seqlen, dist.get_world_size(group))
    rank = dist.get_rank(group)
    return slice(bounds[rank], bounds[rank + 1])


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """Belongs to a model whose encoder computes a part of every document on each rank of ``group``.

    ``gradients`` are averaged after a backward, unless something else does so.
    """

    group: dist.ProcessGroup
    gradients: AveragedGradients | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        """Returns what belongs to a copy of the model: the same ranks, and gradients of its own."""
        if self.gradients is None:
            return self
        model = copy.deepcopy(self.gradients.model, memo)
        return ContextParallel(self.group, AveragedGradients(model, self.group))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def watch(self, output: Tensor) -> Tensor:
        """Returns what an encoder or a decoder returns, once the gradients that go through it are cared for."""
        if self.gradients is not None:
            self.gradients.watch(output)
        return output


def fork_rng(
    context: ContextParallel | None, device: torch.device, *, same_on_all_ranks: bool, enabled: bool = True
) -> AbstractContextManager[None]:
    """Lets all ranks draw the same random numbers in a block, or each rank its own, whatever their seeds are.

    The decoder computes the same on all ranks and so has to drop the same; of the encoder each rank has other rows.
    Where documents are not split (``context`` is None), and where nothing is drawn, there is nothing to do.
    """
    if context is None or not enabled:
        return nullcontext()
    return _forked(context.group, device, 0 if same_on_all_ranks else 1 + context.rank)


@contextmanager
def _forked(group: dist.ProcessGroup, device: torch.device, seed_offset: int) -> Generator[None]:
    """Seeds by what the first rank draws; afterwards the generators go on as if nothing else had been drawn."""
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    seed = int(from_first_rank(seed, group)) + seed_offset
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:  # No other device is drawn on, nor would its generator go on as before.
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def from_first_rank(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the ``x`` of the group's first rank, on all ranks."""
    dist.broadcast(x, group=group, group_src=0)
    return x
