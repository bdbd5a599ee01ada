"""Tests and the demo on releases of what the package stands on, each in an environment of its own.

    python tests/matrix.py                    releases of transformers, over the packages of this environment
    python tests/matrix.py --long             releases of Python, torch and Triton: hours, and gigabytes to download
    python tests/matrix.py --update-readme    also writes what ran into the README's table

Needs an environment with the extra `test` and an index for pip; --long also a C++ compiler and, on PATH or among
pyenv's, the Pythons named below. Environments and logs stay in build/matrix, where they are used again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WORK = ROOT / "build" / "matrix"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
NEWEST = "newest"
LIMIT_S = 3600  # of one command

# the oldest that pyproject.toml allows, the last of version 4, the first of version 5, and what the index has today
TRANSFORMERS = ("4.53", "4.57", "5.0", NEWEST)
# every minor release; each torch but the CPU build of 2.13 brings the Triton that it was built for
PYTHON_AND_TORCH = (("3.10", "2.11"), ("3.12", "2.12"), ("3.11", "2.13"), ("3.11", "2.14"), ("3.13", NEWEST))

DROP_IN = {"drop-in": ["tests/hf"]}
EVERY_LAYER = {
    "attention": [
        "tests/kernels/test_attention.py",
        "-k",
        "cpu and (against_loops or strides or deterministic or window)",
    ],
    "interpreter": ["tests/emulation/interpreter", "-k", "against_loops or test_window"],
    "drop-in": ["tests/hf/test_parity.py", "tests/hf/test_heads.py", "tests/hf/test_probe.py"],
}
DEMO = {"tokens": 2048, "compare-tokens": 1024, "layers": 1, "window": 256, "new-tokens": 4}
RUN_LED = "import sys; from led_model.cli.parser import main; sys.exit(main())"
VERSIONS = """
import json, platform, torch, transformers, triton
print(json.dumps([platform.python_version(), torch.__version__, triton.__version__, transformers.__version__]))
"""
COLUMNS = ("Python", "torch", "Triton", "transformers", "attention", "interpreter", "drop-in", "demo", "date")
RELEASES = COLUMNS[:4]
NOTHING = "–"  # in the cell of tests that are not run


class Failure(Exception):
    """Says that a step of an entry failed."""


@dataclass
class Entry:
    """Describes an environment and what runs in it. ``python`` None: over the packages of this environment."""

    python: str | None
    torch: str | None
    transformers: str
    cells: dict[str, str] = field(default_factory=dict)  # of the table, by column
    failures: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        if self.python is None:
            return f"transformers-{self.transformers}"
        return f"python-{self.python}-torch-{self.torch}"

    @property
    def venv(self) -> Path:
        return WORK / self.name

    @property
    def log(self) -> Path:
        return WORK / f"{self.name}.log"

    @property
    def source(self) -> Path:
        return ROOT if self.python is None else WORK / f"{self.name}-source"

    def run(self) -> Entry:
        start = time.monotonic()
        self.log.unlink(missing_ok=True)
        if self.attempt("installation", self.install):
            for group, arguments in (DROP_IN if self.python is None else EVERY_LAYER).items():
                self.cells[group] = self.attempt(group, self.test, group, arguments) or "failed"
            self.cells["demo"] = self.attempt("demo", self.demo) or "failed"
        self.cells["date"] = datetime.date.today().isoformat()
        print(
            f"{self.name}: {'failed' if self.failures else 'passed'}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        return self

    def attempt(self, what: str, function: Callable[..., str], *arguments) -> str | None:
        """Returns what the function returns; None if it failed, which is noted."""
        try:
            return function(*arguments)
        except Failure as failure:
            self.failures.append(f"{self.name}, {what}: {failure}")
            return None

    def install(self) -> str:
        if self.python is None:
            self.install_over_this()
        else:
            self.install_alone()
        versions = self.call("-c", VERSIONS).splitlines()[-1]
        self.cells.update(zip(RELEASES, json.loads(versions), strict=True))
        for package, wanted in (("torch", self.torch), ("transformers", self.transformers)):
            if wanted not in (None, NEWEST) and not self.cells[package].startswith(f"{wanted}."):
                raise Failure(f"imported {package} {self.cells[package]} instead of {wanted}")
        return versions

    def install_over_this(self) -> None:
        """Installs only what pip has to for this release, which hides what this environment has of it."""
        self.execute(sys.executable, "-m", "venv", "--clear", "--without-pip", str(self.venv))
        (site,) = self.venv.glob("lib/python*/site-packages")
        (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        # transformers imports datasets if it is there, whose release has to go with the same huggingface_hub.
        packages = [requirement("transformers", self.transformers), "datasets"]
        self.call("-m", "pip", "install", "--quiet", "--upgrade", *packages)

    def install_alone(self) -> None:
        """Installs a copy of the sources, in which the extension is built for this Python."""
        if not (self.venv / "made").exists():
            self.execute(find_python(self.python), "-m", "venv", "--clear", str(self.venv))
            self.call("-m", "pip", "install", "--quiet", requirement("torch", self.torch))
            (self.venv / "made").touch()
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in filter(None, files.split("\0")):
            (self.source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, self.source / file)
        packages = ["pytest", "pytest-timeout", "hypothesis", "accelerate", "peft"]
        self.call(
            "-m", "pip", "install", "--quiet", f"--editable={self.source}[triton,text,demo]", *packages,
            requirement("transformers", self.transformers),
        )  # fmt: skip

    def test(self, group: str, arguments: Sequence[str]) -> str:
        """Counts of a run of pytest, whose skips are compared with the committed list."""
        report, skips = (WORK / f"{self.name}-{group}.{kind}" for kind in ("xml", "skips"))
        report.unlink(missing_ok=True)
        skips.unlink(missing_ok=True)
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments)
        try:
            self.call(*command, LED_KERNELS_SKIP_LOG=str(skips))
        except Failure as failure:
            raise Failure(f"{counts(report) if report.exists() else 'no report'}; {failure}") from failure
        all_of = ["--part"] if "-k" in arguments or len(arguments) > 1 else ["--only", *arguments]
        self.call("-m", "tests.skips", str(skips), *all_of)
        return counts(report)

    def demo(self) -> str:
        printed = self.call("-c", RUN_LED, "demo", *(f"--{name}={value}" for name, value in DEMO.items()))
        difference = re.search(r"largest difference over [\d,]+ tokens +(\S+)", printed)
        if difference is None or not float(difference[1]) < 1e-4:
            raise Failure("the encoders differ, or were not compared")
        return "passed"

    def call(self, *arguments: str, **settings: str) -> str:
        """Returns what the environment's Python prints."""
        return self.execute(str(self.venv / "bin" / "python"), *arguments, **settings)

    def execute(self, *command: str, **settings: str) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.source),
            "OMP_NUM_THREADS": "1",
            "LED_KERNELS_CUDA": "0",
            "LED_KERNELS_REQUIRE_EXT": "1",
            **settings,
        }
        cwd = self.source if self.source.exists() else ROOT
        with self.log.open("a+", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            begin = log.tell()
            try:
                status = subprocess.run(
                    command, cwd=cwd, env=environment, stdout=log, stderr=log, timeout=LIMIT_S
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise Failure(f"{' '.join(command[:4])} … took more than {LIMIT_S} s") from error
            log.seek(begin)
            printed = log.read()
        if status:
            raise Failure(f"{Path(command[0]).name} {' '.join(command[1:4])} … ended with status {status}")
        return printed


def requirement(package: str, release: str) -> str:
    return package if release == NEWEST else f"{package}=={release}.*"


def find_python(release: str) -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(pyenv.glob(f"{release}.*/bin/python")), shutil.which(f"python{release}")]
    if found[0] is None:
        raise Failure(f"there is no python{release} on PATH")
    return str(found[0])


def counts(report: Path) -> str:
    """Counts in a JUnit file: what passed, failed and was skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    tests, failures, errors, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    parts = ((tests - failed - skipped, "passed"), (failed, "failed"), (skipped, "skipped"))
    return ", ".join(f"{number} {what}" for number, what in parts if number)


def as_row(cells: dict[str, str]) -> str:
    return f"| {' | '.join(cells.get(column, NOTHING) for column in COLUMNS)} |"


def kind(row: str) -> tuple[list[list[int]], list[bool]]:
    """Returns of a row of the table: its releases, without the patch releases that it ran on, and which tests ran."""
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    releases = [[int(number) for number in cell.split(".")[:2]] for cell in cells[: len(RELEASES)]]
    return releases, [cell != NOTHING for cell in cells]


def update(text: str, rows: Sequence[str]) -> str:
    """Returns the README with these rows in its table, in order; rows of other releases, or of other tests, stay."""
    before, rest = text.split(f"{BEGIN}\n")
    table, after = rest.split(END)
    ran = [kind(row) for row in rows]
    kept = [row for row in table.splitlines()[2:] if kind(row) not in ran]
    head = [as_row(dict(zip(COLUMNS, COLUMNS, strict=True))), f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join([before + BEGIN, *head, *sorted([*kept, *rows], key=kind), END]) + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--long", action="store_true", help="Python, torch and Triton instead of transformers"
    )
    parser.add_argument("--only", default="", help="environments whose name has this in it")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="environments at once (default: processors)"
    )
    parser.add_argument("--update-readme", action="store_true", help="write the table of what ran")
    args = parser.parse_args()

    if args.long:
        entries = [Entry(python, torch, NEWEST) for python, torch in PYTHON_AND_TORCH]
    else:
        entries = [Entry(None, None, release) for release in TRANSFORMERS]
    entries = [entry for entry in entries if args.only in entry.name]
    WORK.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(Entry.run, entries))

    failed = [entry for entry in entries if entry.failures]
    for entry in failed:
        print(f"\n== {entry.log}\n{entry.log.read_text(encoding='utf-8')}")
    rows = [as_row(entry.cells) for entry in entries if "demo" in entry.cells]
    print("", as_row(dict(zip(COLUMNS, COLUMNS, strict=True))), *rows, "", sep="\n")
    for entry in failed:
        print(*entry.failures, sep="\n")
    if args.update_readme:
        README.write_text(update(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return bool(failed or not entries)


if __name__ == "__main__":
    sys.exit(main())
