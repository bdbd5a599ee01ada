"""The graph of imports of this repository's packages, read from the source: nothing is imported.

Every import statement is an arrow, also one inside a function or for type checkers alone. ``from package import name``
is an arrow to ``package.name`` where that is a module, else to the package.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arrow:
    """One import: ``source``, in ``line`` of ``file``, imports ``target``; both are dotted names of modules."""

    source: str
    target: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target}"


def modules(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Returns dotted name -> file, relative to ``root``; a package's name stands for its ``__init__``.

    The stub of a compiled module, a ``.pyi``, is a module, too.
    """
    files = (file for package in packages for file in sorted((root / package).rglob("*.py*")))
    named = {}
    for file in files:
        if file.suffix not in (".py", ".pyi"):
            continue
        relative = file.relative_to(root)
        parts = relative.with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = relative
    return named


def arrows(root: Path, packages: Iterable[str]) -> list[Arrow]:
    """Returns all imports among the modules of ``packages``, folders of ``root``."""
    named = modules(root, packages)
    found: dict[Arrow, None] = {}  # each once, in order
    for source, file in named.items():
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        package = source if file.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(tree):
            for name in _imported(node, package):
                target = name if name in named else name.rpartition(".")[0]
                if target in named and target != source:
                    found[Arrow(source, target, file, node.lineno)] = None
    return list(found)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        yield from (f"{base}.{alias.name}" for alias in node.names)


def circles(found: Iterable[Arrow]) -> list[list[Arrow]]:
    """Returns, for each set of modules that import each other, the arrows of one circle through them."""
    leaving: dict[str, list[Arrow]] = {}
    for arrow in found:
        leaving.setdefault(arrow.source, []).append(arrow)
    in_circles: set[str] = set()
    circles = []
    for start in sorted(leaving):
        if start not in in_circles and (circle := _way_back(start, leaving)):
            in_circles |= {arrow.source for arrow in circle}
            circles.append(circle)
    return circles


def _way_back(start: str, leaving: dict[str, list[Arrow]]) -> list[Arrow] | None:
    """Returns the shortest circle from a module back to it."""
    ways: dict[str, list[Arrow]] = {start: []}
    waiting = [start]
    while waiting:
        source = waiting.pop(0)
        for arrow in leaving.get(source, ()):
            way = [*ways[source], arrow]
            if arrow.target == start:
                return way
            if arrow.target not in ways:
                ways[arrow.target] = way
                waiting.append(arrow.target)
    return None


def against_order(found: Iterable[Arrow], layers: Iterable[str]) -> list[Arrow]:
    """Returns the arrows that run from a lower layer up to a higher one.

    Args:
        layers: names of packages and modules, the highest first. A module belongs to the longest that begins its name.

    Raises:
        KeyError: for a module that belongs to none.
    """
    height = {name: -i for i, name in enumerate(layers)}

    def height_of(module: str) -> int:
        name = module
        while name and name not in height:
            name = name.rpartition(".")[0]
        if not name:
            raise KeyError(f"{module} belongs to no layer")
        return height[name]

    return [arrow for arrow in found if height_of(arrow.source) < height_of(arrow.target)]
