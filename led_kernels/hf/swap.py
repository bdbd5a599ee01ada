"""Modules change their class in place here, to one that adds only methods: parameters, hooks, state-dict keys stay."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import NamedTuple

from torch import nn

ClassTable = dict[type[nn.Module], type[nn.Module]]  # from a class of transformers to the fused class

_OPTIONS = "led_kernels_options"  # the attribute of a fused module that holds what it was given


def set_stock_class(fused: type[nn.Module], stock: type[nn.Module]) -> None:
    """Marks ``fused`` as the class that takes the place of ``stock``."""
    fused.stock_class = stock
    # transformers and accelerate find modules by __name__ (_no_split_modules, config.architectures), which must be the
    # stock one. pickle goes by __qualname__, which stays.
    fused.__name__ = stock.__name__


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module has, or had before it was swapped."""
    return getattr(type(module), "stock_class", type(module))


def fused_class(cls: type[nn.Module], table: ClassTable) -> type[nn.Module] | None:
    """Returns the class that replaces a class of transformers or a subclass of one; None for all others.

    A subclass that overrides the forward keeps it. For such subclasses a fused class may name another replacement, in
    ``where_overridden``, or refuse them, by ``must_not_be_overridden``.

    Raises:
        TypeError: for a subclass that is refused.
    """
    for stock, fused in table.items():
        if cls is stock:
            return fused
        if not issubclass(cls, stock):
            continue
        # transformers wraps the forward of subclasses of checkpointed layers, also one that they inherit.
        if inspect.unwrap(cls.forward) is inspect.unwrap(stock.forward):
            return class_in_place_of(cls, fused, cls)
        if getattr(fused, "must_not_be_overridden", False):
            raise TypeError(
                f"{cls.__name__} overrides the forward of {stock.__name__}, which led_kernels would "
                "replace; leave this model stock."
            )
        if (cautious := getattr(fused, "where_overridden", None)) is not None:
            return class_in_place_of(cls, cautious, cls)
    return None


@functools.cache
def class_in_place_of(stock: type[nn.Module], *bases: type[nn.Module]) -> type[nn.Module]:
    """Makes a class, once, with the methods of the first of ``bases`` that has them and all else of ``stock``."""
    return type(stock.__name__, bases, {"__module__": stock.__module__, "stock_class": stock})


def swap(
    model: nn.Module,
    table: ClassTable,
    options: object,
    own_classes: Mapping[nn.Module, type[nn.Module]] | None = None,
) -> int:
    """Gives the modules in ``model`` the classes that ``table`` has for them, and ``options``.

    When one module is refused, none is changed.

    Args:
        own_classes: modules of ``model`` with the fused classes that they get, whatever ``table`` has for them.

    Returns:
        The number of modules that were changed.

    Raises:
        TypeError: for a module whose class or whose own forward cannot be replaced.
    """
    own = own_classes or {}
    planned = [(module, own.get(module) or _replacement(module, table)) for module in model.modules()]
    changes = [_Change.plan(module, fused) for module, fused in planned if fused is not None]
    for change in changes:
        change.make()
        setattr(change.module, _OPTIONS, options)
    return len(changes)


def _replacement(module: nn.Module, table: ClassTable) -> type[nn.Module] | None:
    """Returns the class that a module is to get; its own forward, on the instance, counts as one of a subclass."""
    stock = stock_class(module)
    fused = fused_class(stock, table)
    cautious = getattr(fused, "where_overridden", None)
    if cautious is not None and "forward" in vars(module) and not _bound_forwards(module):
        return class_in_place_of(stock, cautious, stock)
    return fused


def _bound_forwards(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that hold the forward of its class.

    accelerate's hooks keep the forward that they wrap in _old_forward, and leave it in forward once removed.
    """
    attributes, forward = vars(module), type(module).forward
    return [
        name
        for name in ("forward", "_old_forward")
        if getattr(attributes.get(name), "__func__", None) is forward
    ]


def swap_back(model: nn.Module) -> None:
    """Undoes :func:`swap`."""
    fused = [module for module in model.modules() if stock_class(module) is not type(module)]
    for change in [_Change.plan(module, stock_class(module)) for module in fused]:
        change.make()
        delattr(change.module, _OPTIONS)


class _Change(NamedTuple):
    """A module is to get a new class; ``bound`` are its attributes that hold the forward of its present class."""

    module: nn.Module
    new_class: type[nn.Module]
    bound: list[str]

    @classmethod
    def plan(cls, module: nn.Module, new_class: type[nn.Module]) -> _Change:
        """Plans the change of one module.

        Raises:
            TypeError: for a module whose forward was replaced on the instance by another function.
        """
        bound, forward = _bound_forwards(module), type(module).forward
        if "forward" in vars(module) and not bound and new_class.forward is not forward:
            raise TypeError(
                f"the forward of a {type(module).__name__} was replaced on the instance and would go on "
                "running old code; call this before it is wrapped."
            )
        return cls(module, new_class, bound)

    def make(self) -> None:
        """Changes the module's class, and the forwards that it holds as attributes with it."""
        self.module.__class__ = self.new_class
        for name in self.bound:
            setattr(self.module, name, MethodType(self.new_class.forward, self.module))
