"""Deals documents out to several runs of the same command, for ``--shard``, each document to one of them."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from led_model.batch.documents import Source
from led_model.cli.finding import SUFFIXES


class Shard(NamedTuple):
    """Names one of ``count`` runs by its ``number``, from 1 on."""

    number: int
    count: int

    def own(self, sources: Sequence[Source]) -> list[Source]:
        """Returns the files of this run, and those of JSON lines with the lines of this run alone.

        The n-th file goes to the n-th run and so on in turn, and of JSON lines each line: the runs get equally many
        documents but for one per file, and need not know of each other. Lines of other runs are not parsed.
        """
        found = []
        for place, source in enumerate(sources):
            first = (self.number - 1 - place) % self.count
            if source.is_jsonl:
                found.append(dataclasses.replace(source, every=self.count, first=first))
            elif first == 0:
                found.append(source)
        return found

    def check_output(self, output: str, inputs: Iterable[str]) -> None:
        """Checks that ``output`` is nowhere where the other runs look for documents.

        Raises:
            ValueError: when it is below a directory of the inputs, or matches a glob.
        """
        real = os.path.realpath(output)
        for item in inputs:
            if os.path.isdir(item):
                is_found = real.startswith(os.path.join(os.path.realpath(item), ""))
                is_found = is_found and real.lower().endswith(SUFFIXES)
            else:
                is_found = _matches(real.split(os.sep), os.path.realpath(item).split(os.sep))
            if is_found:
                raise ValueError(
                    f"--output {output} is where {item} looks for documents, and the other shards would read it; put "
                    "it elsewhere."
                )


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tells whether a glob, by its components, names a path."""
    if not pattern:
        return not path
    first, *rest = pattern
    if first == "**":
        return any(_matches(path[start:], rest) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], first) and _matches(path[1:], rest)


def shard(text: str) -> Shard:
    """Returns what ``--shard`` says, which is I/N with I from 1 to N."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N; give 1/4, 2/4, 3/4 and 4/4 to four runs")
    number, count = map(int, match.groups())
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {count}; count from 1/{max(count, 1)} to {max(count, 1)}/{max(count, 1)}"
        )
    return Shard(number, count)
