"""Messages say with these words how the package and its extras are installed: from a clone, as no index serves it."""

from __future__ import annotations

REINSTALL = "run `pip install .` in a clone of the repository"


def install_extra(name: str) -> str:
    """Returns the command that installs the packages of an extra of pyproject.toml."""
    return f"run `pip install '.[{name}]'` in a clone of the repository"
