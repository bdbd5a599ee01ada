"""Splits every document that a model reads over the ranks of a mesh."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from led_kernels.distributed.context import ContextParallel
from led_kernels.distributed.gradients import AveragedGradients

Model = TypeVar("Model", bound=nn.Module)


def context_parallel(model: Model, mesh: DeviceMesh, *, average_gradients: bool = True) -> Model:
    """Makes a model compute a part of every document on each rank of a mesh, forward and backward.

    All ranks of the mesh call the model together, with the same whole documents and labels. In the encoder each
    computes its own rows, and holds only those; the decoder computes the same on all ranks, and attends to keys that
    stay where they are. So every rank has the same loss, logits and generated tokens; ``encoder_last_hidden_state`` is
    of the own rows. Longformer's encoder, whose heads look at any row, gathers its last states on all ranks.

    >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))
    >>> context_parallel(model, mesh["cp"])
    >>> fully_shard(model, mesh=mesh["dp"])

    Args:
        model: of led_model, or of transformers after :func:`led_kernels.hf.apply_led_kernels`; changed in place. It is
            on its device, and has weights that are the same on all ranks.
        mesh: of one dimension. DistributedDataParallel and FSDP2 may use another. Seed its ranks alike for a Longformer
            whose head has dropout, as the head computes the same on all of them.
        average_gradients: whether each backward ends with the mean of the ranks' gradients, which are those of the
            whole documents; what torch.autograd.grad returns is a rank's own. It is not needed where
            DistributedDataParallel or FSDP2 reduce over these ranks as well.

    Returns:
        the model.

    Raises:
        ValueError: for a mesh of another number of dimensions, a model that cannot be split, or one that is already.
        TypeError: for something that is no mesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}; give a torch DeviceMesh, for instance mesh['cp'].")
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; give one of them, for instance mesh['cp'].")
    modules: list[Any] = [module for module in model.modules() if hasattr(type(module), "context")]
    if not any(getattr(type(module), "splits_rows", False) for module in modules):
        raise ValueError(
            "model has no encoder that can be split; give one of led_model, or an LED or Longformer of transformers "
            "after led_kernels.hf.apply_led_kernels(model)."
        )
    for module in model.modules():
        parts: Any = (getattr(module, "encoder", None), getattr(module, "decoder", None))
        supported = [hasattr(type(part), "context") for part in parts]
        if isinstance(parts[1], nn.Module) and supported[0] and not supported[1]:
            raise ValueError(
                f"the decoder of model, a {type(parts[1]).__name__}, cannot attend to keys on several ranks; use a "
                "release of transformers whose decoder led_kernels replaces, or led_model."
            )
    if any(module.context is not None for module in modules):
        raise ValueError("model is split over ranks already; build another.")
    group = mesh.get_group()
    averages = average_gradients and dist.get_world_size(group) > 1
    context = ContextParallel(group, AveragedGradients(model, group) if averages else None)
    for module in modules:
        module.context = context
    return model
