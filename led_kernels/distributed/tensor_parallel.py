"""Models share their attention heads and feed-forwards among the ranks of a mesh here: tensor parallelism.

Every rank computes all tokens of the same batch, by its share of the heads of each attention and of the units of each
feed-forward, and the ranks add up what these give: twice in a layer forward, and once for each input of such a block
backward (Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3). Embeddings, norms and heads
of a model are on every rank, and compute the same there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from led_kernels.parallel_linear import ColumnParallelLinear, FusedColumnParallelLinear, RowParallelLinear

Model = TypeVar("Model", bound=nn.Module)

_PARALLEL = (ColumnParallelLinear, FusedColumnParallelLinear, RowParallelLinear)
_FUSED = 3  # queries, keys and values


def parallelize(model: Model, mesh: DeviceMesh) -> Model:
    """Shards the heads and feed-forwards of a model over the ranks of a mesh, in place, and returns it.

    It serves LED and Longformer of transformers after :func:`led_kernels.hf.apply_led_kernels`, and led_model's models:
    those with a module whose class has a ``tensor_parallel_plan``. It maps patterns of names below that module to what
    becomes of the modules that match: ``"heads"`` (``num_heads`` is divided), ``"columns"`` or ``"rows"`` (a linear
    layer whose output or input features are sharded), or ``"fused columns"`` (one of three parts, each sharded).

    All weights become those of the first rank. Sharded ones are DTensors; the optimizer is built afterwards, and so is
    ``fully_shard(model, mesh=...)`` or ``DistributedDataParallel(model, device_mesh=...)`` over another dimension; the
    latter trains, but torch keeps sharded weights out of ``model.state_dict()`` then, so that the first is to be
    preferred.
    ``model.load_state_dict`` takes a state dict with whole tensors of an unsharded model, too, and
    :func:`full_state_dict` returns one; torch.distributed.checkpoint writes shards. Gradients are clipped by
    :func:`clip_grad_norm_`.

    All ranks of the mesh must be given the same batches, and have drawn the same random numbers, by
    ``torch.manual_seed`` with one seed: dropout on hidden states, which all of them have, must drop the same elements.
    Dropout on attention probabilities and inside of feed-forwards then drops for each share of heads and units what it
    drops for the other shares. ``output_attentions`` gives the probabilities of the heads of this rank.

    Args:
        mesh: of one dimension, as ``init_device_mesh("cuda", (dp, tp), mesh_dim_names=("dp", "tp"))["tp"]``.

    Raises:
        ValueError: for a mesh of more dimensions, heads or units that it does not divide, and a model without a plan.
        TypeError: for a linear layer of another kind: sharded, quantized or with an adapter. The model is unchanged
            then.
    """
    if mesh.ndim != 1:
        raise ValueError(f'mesh has {mesh.ndim} dimensions; give one of them, as mesh["tp"].')
    if any(isinstance(module, _PARALLEL) for module in model.modules()):
        raise TypeError("model is sharded over heads already; parallelize a model once.")
    changes = _planned(model)
    if not changes:
        raise ValueError(
            f"{type(model).__name__} has no tensor_parallel_plan; give a model of led_model, or one of transformers "
            "after led_kernels.hf.apply_led_kernels(model)."
        )
    for change in changes:
        change.check(mesh.size())
    for change in changes:
        change.make(mesh)
    _copy_from_first(model, mesh)
    model.register_load_state_dict_pre_hook(_shard_whole_tensors)
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a parallelized model with whole tensors, by the names of the model before.

    All ranks call it, and each gets all tensors; those that are not sharded share the model's memory. FSDP's shards are
    gathered, too. One rank may then write them: ``model.save_pretrained(directory, state_dict=...)``.
    """
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    for prefix in _fused_prefixes(model):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{prefix}.{part}.{kind}", None) for part in range(_FUSED)]
            if None not in parts:
                state[f"{prefix}.{kind}"] = torch.cat(parts)
    return state


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients so that the norm of all together is at most ``max_norm``, as torch's function of this name does.

    That one takes no gradients of which some are sharded and some are not. All ranks call it.

    Returns:
        the norm before, a scalar.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [
        torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads
    ]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
    return norm


class _Change(NamedTuple):
    """A module is to be sharded as a plan says; ``parent`` holds it by the last part of its ``name``."""

    name: str
    module: Any
    parent: Any
    kind: str

    def check(self, ranks: int) -> None:
        """Checks that the module can be sharded.

        Raises:
            ValueError, TypeError: as :func:`parallelize`.
        """
        if self.kind == "heads":
            self._check_divides(ranks, self.module.num_heads, "heads")
            return
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, DTensor):
            raise TypeError(f"{self.name} is sharded already; parallelize a model before fully_shard.")
        if type(self.module) is not nn.Linear or type(weight) is not nn.Parameter:
            raise TypeError(
                f"{self.name} is a {type(self.module).__name__} with a weight of type {type(weight).__name__}; "
                "parallelize a model of plain nn.Linear layers, before adapters are added and without quantization."
            )
        if self.kind == "rows":
            self._check_divides(ranks, weight.shape[1], "input features")
        else:
            parts = _FUSED if self.kind == "fused columns" else 1
            self._check_divides(ranks, weight.shape[0] // parts, "output features")

    def _check_divides(self, ranks: int, number: int, what: str) -> None:
        if number % ranks:
            raise ValueError(
                f"{self.name} has {number} {what}, which {ranks} ranks do not divide; give a mesh of a size that does."
            )

    def make(self, mesh: DeviceMesh) -> None:
        """Shards the module."""
        if self.kind == "heads":
            self.module.num_heads //= mesh.size()
        elif self.kind == "rows":
            _shard(self.module, RowParallelLinear, mesh, {"weight": 1})
        elif self.kind == "columns":
            _shard(self.module, ColumnParallelLinear, mesh, {"weight": 0, "bias": 0})
        else:
            parts = FusedColumnParallelLinear(_split(self.module)).train(self.module.training)
            for part in parts:
                _shard(part, ColumnParallelLinear, mesh, {"weight": 0, "bias": 0})
            setattr(self.parent, self.name.rpartition(".")[2], parts)


def _planned(model: nn.Module) -> list[_Change]:
    """Returns what the plans in a model ask for."""
    changes = []
    for prefix, holder in model.named_modules():
        plan: Mapping[str, str] = getattr(type(holder), "tensor_parallel_plan", {})
        for name, module in holder.named_modules() if plan else ():
            kinds = [kind for pattern, kind in plan.items() if fnmatchcase(name, pattern)]
            # What lies in a linear layer with an adapter may match, too; the layer is what is refused.
            if kinds and not (kinds[0] != "heads" and _lies_in_planned(name, plan)):
                full = f"{prefix}.{name}" if prefix else name
                changes.append(_Change(full, module, model.get_submodule(full.rpartition(".")[0]), kinds[0]))
    return changes


def _lies_in_planned(name: str, plan: Mapping[str, str]) -> bool:
    """Tells whether a module lies in one that is planned to be a sharded linear layer."""
    parts = name.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts)))
    return any(
        fnmatchcase(path, pattern) and kind != "heads" for path in above for pattern, kind in plan.items()
    )


def _shard(module: nn.Module, kind: type[nn.Module], mesh: DeviceMesh, dims: Mapping[str, int]) -> None:
    """Makes a linear layer one of another kind, and DTensors of its parameters, sharded over these dimensions."""
    module.__class__ = kind
    for name, dim in dims.items():
        if (parameter := getattr(module, name)) is not None:
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(dim)])
            setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _split(module: nn.Linear) -> list[nn.Linear]:
    """Returns the parts of a fused layer as layers."""
    parts = []
    biases = [None] * _FUSED if module.bias is None else module.bias.detach().chunk(_FUSED)
    for weight, bias in zip(module.weight.detach().chunk(_FUSED), biases, strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        part.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        if bias is not None and module.bias is not None:
            part.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
        parts.append(part)
    return parts


@torch.no_grad()
def _copy_from_first(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives every rank the first one's parameters and buffers that are not sharded."""
    for x in (*model.parameters(), *model.buffers()):
        if not isinstance(x, DTensor) and not x.is_meta:
            dist.broadcast(x.detach(), group=mesh.get_group(), group_src=0)


def _fused_prefixes(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedColumnParallelLinear)]


def _shard_whole_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Makes of the whole tensors in a state dict, in place, what the model's parameters are."""
    for fused in _fused_prefixes(model):
        for kind in ("weight", "bias"):
            whole = state_dict.pop(f"{prefix}{fused}.{kind}", None)
            for part, x in enumerate(() if whole is None else whole.chunk(_FUSED)):
                state_dict[f"{prefix}{fused}.{part}.{kind}"] = x
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and whole is not None and not isinstance(whole, DTensor):
            whole = whole.to(parameter.device)
            state_dict[prefix + name] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
