"""How this package and its optional parts are installed, for messages: from a clone, as no index serves it."""

from __future__ import annotations

REINSTALL = "run `pip install .` in a clone of the repository"


def install_extra(name: str) -> str:
    """What brings the packages of an extra of pyproject.toml."""
    return f"run `pip install '.[{name}]'` in a clone of the repository"
