"""What the values of a JSON file or of a caller may be: rules that can be checked and said in words."""

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

LARGEST = 2**31 - 1  # of any count, id or length
_SURROGATE = re.compile("[\ud800-\udfff]")

_LONGEST = 200  # characters of a text that a sentence has from elsewhere
_SHORTLY = reprlib.Repr()
_SHORTLY.maxstring = _LONGEST


@dataclass(frozen=True)
class Rule:
    """``says`` what to give, and whether a value ``holds``; ``optional`` also lets ``None`` pass."""

    says: str
    holds: Callable[[Any], bool]

    @property
    def optional(self) -> Rule:
        return Rule(f"{self.says}, or None", lambda value: value is None or self.holds(value))

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.says}, or {other.says}", lambda value: self.holds(value) or other.holds(value))

    def __and__(self, other: Rule) -> Rule:
        return Rule(f"{self.says}, {other.says}", lambda value: self.holds(value) and other.holds(value))


def whole(low: int, high: int = LARGEST) -> Rule:
    return Rule(
        f"a whole number from {low} to {high}", lambda value: _is_whole(value) and low <= value <= high
    )


def number(low: float, high: float = math.inf) -> Rule:
    says = f"a number of {low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    return Rule(says, lambda value: _is_number(value) and low <= value <= high)


def above(low: float) -> Rule:
    return Rule(f"a number above {low:g}", lambda value: _is_number(value) and value > low)


def one_of(*values: Any) -> Rule:
    """One of ``values``, of its type too: 1 is not ``True``."""
    if all(isinstance(value, str) for value in values):
        says = f"one of {', '.join(values)}"
    else:
        *most, last = map(repr, values)
        says = f"{', '.join(most)} or {last}"
    return Rule(says, lambda value: any(type(value) is type(known) and value == known for known in values))


def list_of(rule: Rule, what: str, least: int = 0, most: int = LARGEST) -> Rule:
    return Rule(
        f"a list of {what}",
        lambda value: (
            isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(rule.holds, value))
        ),
    )


def table_of(key: Rule, value: Rule, what: str) -> Rule:
    return Rule(
        f"an object of {what}",
        lambda table: (
            isinstance(table, Mapping)
            and all(map(key.holds, table))
            and all(map(value.holds, table.values()))
        ),
    )


def object_of(says: str, needed: Mapping[str, Rule], others: Mapping[str, Rule] | None = None) -> Rule:
    """With all the ``needed`` values, and perhaps ``others``."""
    return Rule(
        says,
        lambda value: (
            isinstance(value, Mapping)
            and all(name in value and rule.holds(value[name]) for name, rule in needed.items())
            and all(rule.holds(value[name]) for name, rule in (others or {}).items() if name in value)
        ),
    )


ANYTHING = Rule("anything", lambda value: True)
FLAG = one_of(True, False)
TEXT = Rule("a text", lambda value: isinstance(value, str) and _is_unicode(value))
TOKEN_ID = whole(0)
TOKEN_IDS = list_of(TOKEN_ID, "token ids")


def check_values(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Holds those of ``values`` that have a rule against it.

    Raises:
        ValueError: naming the value and what to give.
    """
    for name, rule in rules.items():
        if name in values and not rule.holds(values[name]):
            raise ValueError(f"{name} is {reprlib.repr(values[name])}; give {rule.says}.")


def quoted(text: object) -> str:
    """A text of a file, for a sentence: between quotes, in one line, shortened."""
    return _SHORTLY.repr(str(text))


def plain(text: object) -> str:
    """A name or a sentence of a file or a library, for a sentence: as it is, but in one line and shortened."""
    text = str(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def make_plain(settings: object) -> None:
    """Turns numpy's numbers among the attributes into Python's, which JSON and torch take everywhere; integers that
    torch does not take become floats."""
    for name, value in vars(settings).items():
        if _is_whole(value) and abs(value) < 2**63:
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Finite, also as a float: JSON may spell an integer of any length."""
    if isinstance(value, Integral):
        return _is_whole(value) and abs(int(value)) <= sys.float_info.max
    return isinstance(value, Real) and math.isfinite(value)


def _is_unicode(text: str) -> bool:
    """JSON may spell half a surrogate pair, which nothing can print or encode."""
    return _SURROGATE.search(text) is None
