"""Decides whether a decoding step may be captured, and whether the modules are still those that were captured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from led_kernels.eager import is_plain_surroundings
from led_kernels.modules import has_global_hooks


class Part(Protocol):
    """Describes anything with ``nn.Module.modules``, since a protocol cannot inherit from ``nn.Module``."""

    def modules(self) -> Iterator[nn.Module]:
        """Yields the module itself and all modules in it."""


Parts = tuple[Part, ...]

# These are the methods by which torch runs any module.
_CALL_METHODS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "forward")

# This holds the methods of the classes that a captured step consists of, as they were imported, by class and name.
_METHODS: dict[type[nn.Module], dict[str, Any]] = {}


def allow_capture(*classes: type[nn.Module]) -> None:
    """Lets modules of ``classes`` be captured, as long as they have the methods of the time of this call."""
    for cls in classes:
        ours = (base for base in cls.__mro__ if base.__module__.startswith("led_model."))
        methods = {name for base in ours for name, value in vars(base).items() if type(value) is FunctionType}
        names = {*_CALL_METHODS, *(name for name in methods if not name.startswith("__"))}
        _METHODS[cls] = {name: getattr(cls, name) for name in names}


def is_unpatched(module: object, name: str) -> bool:
    """Returns whether a method is what it was when it was imported, neither patched nor overridden."""
    cls = next(base for base in type(module).__mro__ if base in _METHODS)
    return getattr(type(module), name) is _METHODS[cls][name] and name not in vars(module)


def is_capturable(parts: Parts) -> bool:
    """Returns whether calling the modules in ``parts`` runs no code of a caller, which a replay would leave out."""
    return not has_global_hooks() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or type(module) not in _METHODS
        or _METHODS[type(module)].keys() & vars(module).keys()
        or not _Methods({type(module)}).are_unpatched()
        for module in _modules(parts)
    )


def is_plain_eager() -> bool:
    """Returns whether neither a mode nor autocast changes what operations do where this is called."""
    return not torch.is_autocast_enabled("cpu") and is_plain_surroundings()


class _Methods:
    """Compares the methods of some classes with those that they were imported with."""

    def __init__(self, classes: set[type[nn.Module]]) -> None:
        found = [(cls, *item) for cls in classes for item in _METHODS[cls].items()]
        self._classes, self._names, self._imported = zip(*found, strict=True)

    def are_unpatched(self) -> bool:
        return all(map(is_, map(getattr, self._classes, self._names), self._imported))


class ModuleGuards:
    """Guards the modules in ``parts``: all that they hold, their code and where their parameters lie.

    Parameters changed in place need no guard, for a replay reads what their memory holds. Their memory is kept as long
    as the guards are, so that no captured call points to what was freed.
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
        self._places = self._parameter_places()

    def failed(self, parts: Parts) -> bool:
        """Returns whether anything has changed since the guards were made."""
        return (
            parts != self._parts
            or has_global_hooks()
            or any(self._hooks)
            or sum(map(len, self._tables)) != len(self._values)
            or not all(map(is_, _values_of(self._tables), self._values))
            or not all(map(is_, map(type, self._modules), self._types))
            or not self._methods.are_unpatched()
            or self._parameter_places() != self._places
        )

    def _parameter_places(self) -> list[Any]:
        """Returns the addresses, strides and sizes of all parameters."""
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
