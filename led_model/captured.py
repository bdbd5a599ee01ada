"""Whether a decoding step may be recorded, and whether what a recording points to is still what the modules have."""

from __future__ import annotations

from torch import nn

from led_kernels.projection import has_global_hooks

Parts = tuple[nn.Module, ...]


def runs_only_layers(parts: Parts) -> bool:
    """Whether calling the modules in ``parts`` runs nothing of a caller's own, which a replay would leave out."""
    return not has_global_hooks() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(("led_model.", "torch.nn."))
        for part in parts
        for module in part.modules()
    )


class Watched:
    """The modules in ``parts``, their hooks and the addresses of their parameters, as they are now.

    Parameters changed in place need no watching, for a replay reads what their memory holds. Their memory is kept
    until the next look, so that no recording points to what was freed.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._modules = [vars(module) for part in parts for module in part.modules()]
        self._tables = [m[name] for m in self._modules for name in ("_modules", "_parameters") if m[name]]
        self._values = [value for table in self._tables for value in table.values()]
        self._parameters = [value for value in self._values if isinstance(value, nn.Parameter)]
        self._memory = [parameter.detach() for parameter in self._parameters]
        self._state = self._look()

    def changed(self, parts: Parts) -> bool:
        return parts != self._parts or self._look() != self._state

    def _look(self) -> list[int | bool]:
        """Numbers that tell one state from another; the ids are of what is kept alive here."""
        state: list[int | bool] = [has_global_hooks()]
        for module in self._modules:
            has_hooks = module["_forward_hooks"] or module["_forward_pre_hooks"] or "forward" in module
            state += (bool(has_hooks), module["training"])
        state += [id(value) for table in self._tables for value in table.values()]
        state += [parameter.data_ptr() for parameter in self._parameters]
        return state
