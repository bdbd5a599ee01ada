"""Whether a decoding step may be recorded, and whether what a recording points to is still what the modules have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from led_kernels.eager import is_plain_surroundings
from led_kernels.projection import has_global_hooks

Parts = tuple[nn.Module, ...]

_CALL = (
    "__call__",
    "_wrapped_call_impl",
    "_call_impl",
    "__getattr__",
    "forward",
)  # how torch runs any module

# The methods of classes that a recorded step consists of, as they were imported: by class, name and function.
_METHODS: dict[type[nn.Module], dict[str, Any]] = {}


def remember_code(*classes: type[nn.Module]) -> None:
    """Takes the methods that ``classes`` have now for what a recording stands for; with others it is not made."""
    for cls in classes:
        ours = (base for base in cls.__mro__ if base.__module__.startswith("led_model."))
        methods = {name for base in ours for name, value in vars(base).items() if type(value) is FunctionType}
        names = {*_CALL, *(name for name in methods if not name.startswith("__"))}
        _METHODS[cls] = {name: getattr(cls, name) for name in names}


def runs_imported(module: nn.Module, name: str) -> bool:
    """Whether a method is what it was when it was imported, neither patched nor overridden."""
    cls = next(base for base in type(module).__mro__ if base in _METHODS)
    return getattr(type(module), name) is _METHODS[cls][name] and name not in vars(module)


def runs_only_layers(parts: Parts) -> bool:
    """Whether calling the modules in ``parts`` runs nothing of a caller's own, which a replay would leave out."""
    return not has_global_hooks() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or type(module) not in _METHODS
        or _METHODS[type(module)].keys() & vars(module).keys()
        or not _Methods({type(module)}).are_the_imported()
        for module in _modules(parts)
    )


def is_plain_here() -> bool:
    """Whether operations do, where this is called, what they do everywhere: no mode and no autocast looks on."""
    return not torch.is_autocast_enabled("cpu") and is_plain_surroundings()


class _Methods:
    """Looks up all methods of some classes at once."""

    def __init__(self, classes: set[type[nn.Module]]) -> None:
        found = [(cls, *item) for cls in classes for item in _METHODS[cls].items()]
        self._classes, self._names, self._imported = zip(*found, strict=True)

    def are_the_imported(self) -> bool:
        return all(map(is_, map(getattr, self._classes, self._names), self._imported))


class Watched:
    """The modules in ``parts``, all that they hold, their code and where their parameters lie, as they are now.

    Parameters changed in place need no watching, for a replay reads what their memory holds. Their memory is kept
    until the next look, so that no recording points to what was freed.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._modules = list(_modules(parts))
        self._types = list(map(type, self._modules))
        self._methods = _Methods(set(self._types))
        own = list(map(vars, self._modules))
        self._hooks = [module[name] for module in own for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._tables = own + [module[name] for module in own for name in ("_modules", "_parameters")]
        self._values = list(_values_of(self._tables))
        self._parameters = [value for value in self._values if isinstance(value, nn.Parameter)]
        self._memory = [parameter.detach() for parameter in self._parameters]
        self._places = self._look()

    def changed(self, parts: Parts) -> bool:
        return (
            parts != self._parts
            or has_global_hooks()
            or any(self._hooks)
            or sum(map(len, self._tables)) != len(self._values)
            or not all(map(is_, _values_of(self._tables), self._values))
            or not all(map(is_, map(type, self._modules), self._types))
            or not self._methods.are_the_imported()
            or self._look() != self._places
        )

    def _look(self) -> list[Any]:
        parameters = self._parameters
        return [
            *map(Tensor.data_ptr, parameters),
            *map(Tensor.stride, parameters),
            *map(Tensor.size, parameters),
        ]


def _modules(parts: Parts) -> Iterator[nn.Module]:
    return (module for part in parts for module in part.modules())


def _values_of(tables: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, tables))
