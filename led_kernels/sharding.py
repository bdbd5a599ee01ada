"""The operators of attention take DTensors by the rules that are written here: sharded over heads, or over the batch.

A rank computes its heads, or its sequences, by itself, without communication. Gradients are sharded as their tensors.
This module imports torch.distributed.tensor, and is imported once an operator is called with a DTensor.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._ops import OpOverload
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from led_kernels.mask_tensors import MaskTensors

_PER_SEQUENCE = MaskTensors._fields  # has a row for each sequence and nothing for heads
_SHARED = ("seed",)


@functools.cache
def register(op: OpOverload) -> None:
    """Tells torch how an operator's tensors may be sharded, once.

    The heads are the last dimension but one of q, k, v, out, lse and of their gradients, padded and packed. Sequences
    are the first of every tensor, unless they are packed; torch takes the slices of a replicated mask by itself.
    """
    names = [argument.name for argument in op._schema.arguments]

    def placements(shard: str, specs: dict[str, Any]) -> list[Placement | None]:
        return [_placement(name, spec, shard) for name, spec in specs.items()]

    def rules(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        specs = dict(zip(names, args, strict=True))
        q, k = (
            next(x for name, x in specs.items() if name.removesuffix("_global") == which) for which in "qk"
        )
        found: list[Any] = []
        for shard in ("nothing", "heads", "batch"):
            if shard == "batch" and k.ndim == 3:
                continue
            of_q = _place(shard, q.ndim)
            # The forward returns out and lse, which has no head_dim; the backward the gradients of q, k and v.
            of_other = _place(shard, q.ndim - 1, head_dim=False) if len(op._schema.returns) == 2 else None
            outputs = [of_q, of_other] if of_other is not None else [of_q, *[_place(shard, k.ndim)] * 2]
            found.append((outputs, placements(shard, specs)))
        return found

    register_sharding(op)(rules)


def _placement(name: str, spec: Any, shard: str) -> Placement | None:
    """Returns where an argument of an operator is, None for those that are no tensors."""
    if not hasattr(spec, "placements"):
        return None
    if name in _SHARED or (shard == "heads" and name in _PER_SEQUENCE):
        return Replicate()
    return _place(shard, spec.ndim, head_dim=name not in ("lse", "d_lse"))


def _place(shard: str, ndim: int, head_dim: bool = True) -> Placement:
    if shard == "nothing":
        return Replicate()
    return Shard(0) if shard == "batch" else Shard(ndim - 2)


def check_dropout(q: Any, dropout_p: float) -> None:
    """Checks that dropout is not asked of a sharded DTensor.

    Raises:
        ValueError: when it is.
    """
    if dropout_p > 0 and not all(placement.is_replicate() for placement in q.placements):
        raise ValueError(
            f"dropout_p is {dropout_p} and q a DTensor that is sharded, of which every rank would drop the same "
            "elements; call it on local tensors (q.to_local()), with another seed of torch on each rank."
        )
