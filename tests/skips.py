"""Which tests were skipped, against the committed list ``skips.txt``.

    LED_KERNELS_SKIP_LOG=$PWD/skips.log pytest             appends every skip to that file
    python -m tests.skips skips.log [--only tests/hf]

A line of the list is ``condition | test | reason``, where ``*`` stands for anything. A skip that is on no line whose
condition holds here is an error, and so is a line whose condition holds and that no skip is on, unless ``--part`` says
that only some of the tests ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.backends import has_extension

LIST = Path(__file__).with_name("skips.txt")
_log = os.environ.pop("LED_KERNELS_SKIP_LOG", None)  # not for the processes that tests start


def note(report) -> None:
    """Appends a report of pytest's to the log, if one is asked for and it is a skip."""
    if _log and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        with open(_log, "a", encoding="utf-8") as file:
            print(json.dumps([report.nodeid, reason]), file=file)


@dataclass(frozen=True)
class Line:
    condition: str
    test: str
    reason: str

    def __str__(self) -> str:
        return f"{self.condition} | {self.test} | {self.reason}"

    def covers(self, test: str, reason: str) -> bool:
        return _fits(self.test, test) and _fits(self.reason, reason)

    def applies(self) -> bool:
        """Tells whether every skip of this line must occur here; conditions are joined by commas."""
        return all(_holds(name.strip()) for name in self.condition.split(","))


def _fits(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


@functools.cache
def _holds(condition: str) -> bool:
    """A condition asks what the machine and the environment have, never the code under test."""
    if match := re.fullmatch(r"([\w-]+) *(<|>=) *([\d.]+)", condition):
        package, relation, release = match.groups()
        here, wanted = (tuple(map(int, text.split(".")[:2])) for text in (version(package), release))
        return (here < wanted) == (relation == "<")
    return {
        "always": lambda: True,
        "no gpu": lambda: not _has_gpu(),
        "gpu": _has_gpu,
        "no nvcc": lambda: not _has_nvcc(),
        "no extension": lambda: not has_extension(),
        "no objdump": lambda: shutil.which("objdump") is None,
        "one processor": lambda: len(os.sched_getaffinity(0)) < 2,
        "no x86": lambda: platform.machine() not in ("x86_64", "AMD64"),
    }[condition]()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") is not None or (home is not None and Path(home, "bin/nvcc").exists())


def read_list(path: Path = LIST) -> list[Line]:
    rows = (row.strip() for row in path.read_text(encoding="utf-8").splitlines())
    return [Line(*(cell.strip() for cell in row.split("|", 2))) for row in rows if row and row[0] != "#"]


def faults(lines: list[Line], skips: list[tuple[str, str]], part: bool = False) -> list[str]:
    """Returns what differs between the list and the skips, one sentence each."""
    here = [line for line in lines if line.applies()]
    unlisted = [s for s in skips if not any(line.covers(*s) for line in here)]
    found = [f"not on the list: {test} | {reason}" for test, reason in dict.fromkeys(unlisted)]
    if not part:
        found += [f"no test was skipped: {line}" for line in here if not any(line.covers(*s) for s in skips)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--only", default="", help="beginning of the tests that ran")
    parser.add_argument("--part", action="store_true", help="some of them ran: lines need not occur")
    args = parser.parse_args()
    rows = args.log.read_text(encoding="utf-8").splitlines() if args.log.exists() else []
    skips = sorted({tuple(json.loads(row)) for row in rows})  # each process of pytest -n collects all modules
    lines = [line for line in read_list() if line.test.startswith(args.only)]
    found = faults(lines, skips, args.part)
    for fault in found:
        print(f"{LIST.name}: {fault}", file=sys.stderr)
    print(f"{len(skips)} skips, {len(found)} of them or of the list's lines unexpected")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
