"""Gives ``nn.ModuleList`` the type of its modules, which torch's own annotations leave open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Generic, TypeVar, overload

    Kind = TypeVar("Kind", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[Kind]):
        """An ``nn.ModuleList`` of modules of one kind."""

        def __init__(self, modules: Iterable[Kind]) -> None: ...

        def __iter__(self) -> Iterator[Kind]: ...

        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...

        @overload
        def __getitem__(self, idx: int) -> Kind: ...
else:
    ModuleList = nn.ModuleList
