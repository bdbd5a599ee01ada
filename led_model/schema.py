"""Defines rules for the values of a JSON file or of a caller, which can be checked and put in words."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

LARGEST = 2**31 - 1  # the bound on any count, id or length
_SURROGATE = re.compile("[\ud800-\udfff]")

_LONGEST = 200  # characters of a foreign text that a message quotes at most
_SHORTLY = reprlib.Repr()
_SHORTLY.maxstring = _LONGEST


@dataclass(frozen=True)
class Rule:
    """Pairs a ``description`` of what to give with a function that tells whether it ``accepts`` a value."""

    description: str
    accepts: Callable[[Any], bool]

    @property
    def optional(self) -> Rule:
        """Returns a rule that also accepts ``None``."""
        return Rule(f"{self.description}, or None", lambda value: value is None or self.accepts(value))

    def __or__(self, other: Rule) -> Rule:
        return Rule(
            f"{self.description}, or {other.description}",
            lambda value: self.accepts(value) or other.accepts(value),
        )

    def __and__(self, other: Rule) -> Rule:
        return Rule(
            f"{self.description}, {other.description}",
            lambda value: self.accepts(value) and other.accepts(value),
        )


def integer(low: int, high: int = LARGEST) -> Rule:
    """Returns a rule for integers from ``low`` to ``high``, both inclusive."""
    return Rule(
        f"a whole number from {low} to {high}", lambda value: _is_integer(value) and low <= value <= high
    )


def number(low: float, high: float = math.inf) -> Rule:
    """Returns a rule for finite numbers from ``low`` to ``high``, both inclusive."""
    description = f"a number of {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    return Rule(description, lambda value: _is_number(value) and low <= value <= high)


def one_of(*values: Any) -> Rule:
    """Returns a rule for one of ``values``, of its type too: 1 is not ``True``."""
    if all(isinstance(value, str) for value in values):
        description = f"one of {', '.join(values)}"
    else:
        *most, last = map(repr, values)
        description = f"{', '.join(most)} or {last}"
    return Rule(
        description, lambda value: any(type(value) is type(known) and value == known for known in values)
    )


# Building a layer takes milliseconds, whatever is in it, so that their number needs a low bound.
LAYERS, WIDTH = integer(1, 256), integer(1, 2**20)
PROBABILITY = number(0, 1)
EVEN = Rule("a positive even number", lambda value: integer(2).accepts(value) and value % 2 == 0)


def list_of(rule: Rule, what: str, least: int = 0, most: int = LARGEST) -> Rule:
    """Returns a rule for lists of ``least`` to ``most`` values that ``rule`` accepts."""
    return Rule(
        f"a list of {what}",
        lambda value: (
            isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(rule.accepts, value))
        ),
    )


def mapping_of(key: Rule, value: Rule, what: str) -> Rule:
    """Returns a rule for objects whose keys and values follow these rules."""
    return Rule(
        f"an object of {what}",
        lambda table: (
            isinstance(table, Mapping)
            and all(map(key.accepts, table))
            and all(map(value.accepts, table.values()))
        ),
    )


def object_of(
    description: str, required: Mapping[str, Rule], others: Mapping[str, Rule] | None = None
) -> Rule:
    """Returns a rule for an object with all the ``required`` values, and perhaps with ``others``."""
    return Rule(
        description,
        lambda value: (
            isinstance(value, Mapping)
            and all(name in value and rule.accepts(value[name]) for name, rule in required.items())
            and all(rule.accepts(value[name]) for name, rule in (others or {}).items() if name in value)
        ),
    )


ANYTHING = Rule("anything", lambda value: True)
BOOLEAN = one_of(True, False)
STRING = Rule("a text", lambda value: isinstance(value, str) and _is_unicode(value))
TOKEN_ID = integer(0)
TOKEN_IDS = list_of(TOKEN_ID, "token ids")


def check_values(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Checks each of ``values`` that has a rule of its name.

    Raises:
        ValueError: naming the value and what to give.
    """
    for name, rule in rules.items():
        if name in values and not rule.accepts(values[name]):
            raise ValueError(f"{name} is {reprlib.repr(values[name])}; give {rule.description}.")


def quoted(text: object) -> str:
    """Returns a text of a file as a message shows it: between quotes, in one line, shortened."""
    return _SHORTLY.repr(str(text))


def printable(text: object) -> str:
    """Returns a name or a sentence of a file or a library as a message shows it: in one line, shortened."""
    text = str(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return escape_unprintable(text)


def escape_unprintable(text: str) -> str:
    """Returns a text with ``\\n`` and the like in place of line breaks and of what else cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def convert_numbers(settings: object) -> None:
    """Turns numpy's numbers among the attributes into Python's, which JSON and torch take everywhere.

    Integers that torch does not take become floats.
    """
    for name, value in vars(settings).items():
        if _is_integer(value) and abs(value) < 2**63:
            setattr(settings, name, int(value))
        elif _is_number(value):
            setattr(settings, name, float(value))


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses names that are not known.

    Raises:
        TypeError: with the known name that is most like it.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            like = get_close_matches(name, known, n=1)
            hint = f"did you mean {like[0]!r}?" if like else f"it has {', '.join(known)}."
            raise TypeError(f"{where} has no argument {name!r}; {hint}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number, also as a float: JSON may spell an integer of any length."""
    if isinstance(value, Integral):
        return _is_integer(value) and abs(int(value)) <= sys.float_info.max
    return isinstance(value, Real) and math.isfinite(value)


def _is_unicode(text: str) -> bool:
    """Returns whether a text has no half of a surrogate pair, which JSON may spell and nothing can print or encode."""
    return _SURROGATE.search(text) is None
