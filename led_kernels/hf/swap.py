"""How a module changes its class in place, to one that adds only methods: parameters, hooks, state-dict keys stay."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import NamedTuple

from torch import nn

Table = dict[type[nn.Module], type[nn.Module]]  # a class of transformers, and ours


def replaces(stock: type[nn.Module], ours: type[nn.Module]) -> None:
    """Marks ``ours`` as what takes the place of ``stock``."""
    ours.stock_class = stock
    # transformers and accelerate find modules by __name__ (_no_split_modules, config.architectures); pickle
    # goes by __qualname__, which stays
    ours.__name__ = stock.__name__


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was swapped."""
    return getattr(type(module), "stock_class", type(module))


def class_of_ours(cls: type[nn.Module], table: Table) -> type[nn.Module] | None:
    """What replaces a class of transformers or a subclass of one; None for all others.

    A subclass that overrides the forward keeps it; ours may name, as ``where_overridden``, what it gets instead, or
    refuse it as ``must_not_be_overridden``.

    Raises:
        TypeError: for a subclass that overrides a forward whose work ours would no longer do.
    """
    for stock, ours in table.items():
        if cls is stock:
            return ours
        if not issubclass(cls, stock):
            continue
        # transformers wraps the forward of subclasses of checkpointed layers, also one they inherit
        if inspect.unwrap(cls.forward) is inspect.unwrap(stock.forward):
            return _joined(ours, cls)
        if getattr(ours, "must_not_be_overridden", False):
            raise TypeError(
                f"{cls.__name__} overrides the forward of {stock.__name__}, which led_kernels would "
                "replace; leave this model stock."
            )
        if (cautious := getattr(ours, "where_overridden", None)) is not None:
            return _joined(cautious, cls)
    return None


@functools.cache
def _joined(ours: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (ours, cls), {"__module__": cls.__module__, "stock_class": cls})


def swap(model: nn.Module, table: Table, options: object) -> int:
    """Gives the modules in ``model`` the classes that ``table`` has for them, and ``options``; returns how many.

    All of them or, when one is refused, none.
    """
    planned = [(module, class_of_ours(stock_class(module), table)) for module in model.modules()]
    changes = [_Change.plan(module, ours) for module, ours in planned if ours is not None]
    for change in changes:
        change.make()
        change.module.led_kernels_options = options
    return len(changes)


def swap_back(model: nn.Module) -> None:
    """Undoes :func:`swap`."""
    ours = [module for module in model.modules() if stock_class(module) is not type(module)]
    for change in [_Change.plan(module, stock_class(module)) for module in ours]:
        change.make()
        del change.module.led_kernels_options


class _Change(NamedTuple):
    """A module, the class it is to get, and which instance attributes hold the forward of its present one."""

    module: nn.Module
    new_class: type[nn.Module]
    bound: list[str]

    @classmethod
    def plan(cls, module: nn.Module, new_class: type[nn.Module]) -> _Change:
        attributes, forward = vars(module), type(module).forward
        # accelerate's hooks keep the forward they wrap in _old_forward, and leave it in forward once removed
        bound = [
            name
            for name in ("forward", "_old_forward")
            if getattr(attributes.get(name), "__func__", None) is forward
        ]
        if "forward" in attributes and not bound and new_class.forward is not forward:
            raise TypeError(
                f"the forward of a {type(module).__name__} was replaced on the instance and would go on "
                "running old code; call this before it is wrapped."
            )
        return cls(module, new_class, bound)

    def make(self) -> None:
        self.module.__class__ = self.new_class
        for name in self.bound:
            setattr(self.module, name, MethodType(self.new_class.forward, self.module))
