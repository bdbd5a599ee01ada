"""Keeps tensors that have several names once in a state dict, as safetensors refuses to store the same memory twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def keep_tied_tensors_once(model: nn.Module) -> None:
    """Makes ``model.state_dict()`` hold a parameter under its first name alone, and ``load_state_dict`` need no other.

    A state dict that has all names is loaded as well.
    """
    model.register_state_dict_post_hook(_drop_other_names)
    model.register_load_state_dict_pre_hook(_fill_other_names)


def _names_of_parameters(model: nn.Module) -> list[list[str]]:
    """Returns for each parameter all names that it has in the model."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _drop_other_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for names in _names_of_parameters(model):
        for name in names[1:]:
            state_dict.pop(prefix + name, None)


def _fill_other_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for names in _names_of_parameters(model):
        present = next((state_dict[prefix + name] for name in names if prefix + name in state_dict), None)
        if present is not None:
            for name in names:
                state_dict.setdefault(prefix + name, present)
