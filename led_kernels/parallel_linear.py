"""These linear layers hold a part of their weight: the output features of some heads, or the input features of them.

They are the two halves of a block in tensor parallelism (Shoeybi et al., "Megatron-LM", 2019,
https://arxiv.org/abs/1909.08053, section 3). Weights are DTensors, whose optimizers, checkpoints and FSDP torch knows;
what is computed with is the part of this rank. torch.distributed.tensor is imported where a weight is one, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.modules import is_hooked, is_plain_linear


def copy_to_ranks(x: Tensor, mesh: Any) -> Tensor:
    """Returns ``x``, which every rank has; its gradient is the sum of what all ranks of the ``mesh`` send."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_over_ranks(x: Tensor, mesh: Any) -> Tensor:
    """Returns the sum of what the ranks of the ``mesh`` give; every rank gets the gradient of the sum."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return (
        DTensor.from_local(x, mesh, [Partial()], run_check=False)
        .redistribute(placements=[Replicate()])
        .to_local()
    )


class ColumnParallelLinear(nn.Linear):
    """Computes this rank's share of the output features from the whole input, ``[..., in_features]``.

    ``weight`` and ``bias`` are DTensors, sharded over their rows. The result is ``[..., out_features / ranks]``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(copy_to_ranks(input, _mesh(self)), _local(self.weight), _local(self.bias))


class FusedColumnParallelLinear(nn.ModuleList):
    """Computes the share of several layers of one input, which were the parts of one weight, as one layer.

    The result is ``[..., out_features / ranks]``: this rank's share of the first, then that of the second, and so on.
    """

    def forward(self, input: Tensor) -> Tensor:
        parts: list[Any] = list(self)
        input = copy_to_ranks(input, _mesh(parts[0]))
        weights, biases = [_local(part.weight) for part in parts], [_local(part.bias) for part in parts]
        if input.numel() <= weights[0].numel():  # Copying the results costs less than copying the weights.
            return torch.cat([F.linear(input, *pair) for pair in zip(weights, biases, strict=True)], -1)
        return F.linear(input, torch.cat(weights), None if biases[0] is None else torch.cat(biases))


class RowParallelLinear(nn.Linear):
    """Computes the output features from this rank's share of the input, ``[..., in_features / ranks]``, and sums them.

    ``weight`` is a DTensor that is sharded over its columns; ``bias`` is a tensor that every rank has. The result is
    ``[..., out_features]``, the same on every rank.
    """

    def forward(self, input: Tensor) -> Tensor:
        out = sum_over_ranks(F.linear(input, _local(self.weight)), _mesh(self))
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Product(NamedTuple):
    """Says what calling a linear layer multiplies: the result is ``x weightᵀ + bias``."""

    weight: Tensor
    bias: Tensor | None


def products(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, list[Product]] | None:
    """Returns what calling each of the modules on ``x`` multiplies, if that is all that they do, else None.

    Returns:
        ``x``, with a gradient that is summed over ranks where weights are sharded; and for each module the weight and
        the bias that this rank computes with.
    """
    plain = [module for module in modules if is_plain_linear(module)]
    sharded = [module for module in modules if type(module) is ColumnParallelLinear and not is_hooked(module)]
    if any(module.weight.device != x.device for module in (*plain, *sharded)):
        return None
    if len(plain) == len(modules):
        return x, [Product(module.weight, module.bias) for module in plain]
    if len(sharded) == len(modules):
        x = copy_to_ranks(x, _mesh(sharded[0]))
        return x, [Product(_local(module.weight), _local(module.bias)) for module in sharded]
    return None


def _mesh(module: Any) -> Any:
    return module.weight.device_mesh


def _local(x: Any) -> Any:
    """Returns the part of a DTensor that this rank holds; a missing bias stays None."""
    return None if x is None else x.to_local()
