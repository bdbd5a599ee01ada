"""The comparison of skips with the committed list, and the table of the releases that ran."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.matrix import COLUMNS, README, as_row, update
from tests.skips import Line, faults, read_list

HERE = Line("always", "tests/test_a.py::test_f[2-*", "no * there")
ELSEWHERE = Line("transformers < 1.0", "tests/test_b.py", "transformers is old")


@pytest.mark.parametrize(
    ("skips", "part", "expected"),
    [
        ([("tests/test_a.py::test_f[2-torch]", "no wool there")], False, []),
        ([], True, []),
        ([], False, [f"no test was skipped: {HERE}"]),
        (
            [("tests/test_a.py::test_f[3-torch]", "no wool there")],
            True,
            ["not on the list: tests/test_a.py::test_f[3-torch] | no wool there"],
        ),
        (
            [("tests/test_a.py::test_f[2-torch]", "no wool here")],
            True,
            ["not on the list: tests/test_a.py::test_f[2-torch] | no wool here"],
        ),
        (
            [("tests/test_b.py", "transformers is old")],
            True,
            ["not on the list: tests/test_b.py | transformers is old"],
        ),
    ],
    ids=["as listed", "in part", "missing", "other test", "other reason", "condition does not hold"],
)
def test_faults(skips, part, expected):
    assert faults([HERE, ELSEWHERE], skips, part) == expected


def test_conditions_of_versions():
    here = ".".join(version("torch").split(".")[:2])
    assert Line(f"torch >= {here}", "", "").applies()
    assert not Line(f"torch < {here}", "", "").applies()
    assert Line("torch < 99.0", "", "").applies()
    assert not Line("always, torch >= 99.0", "", "").applies()


def test_every_condition_of_the_list_is_known():
    lines = read_list()
    assert lines
    for line in lines:
        assert line.applies() in (True, False)


def test_no_condition_asks_the_backend_itself():
    """``tests.backends`` says where a backend has to run; one that refuses there must fail its tests."""
    asks = re.compile(r"skipif\([^\n]*can_run|can_run[^\n]*:\n\s+pytest\.skip")
    files = [file for file in README.parent.glob("tests/**/*.py") if file.name != "test_skips.py"]
    assert len(files) > 50
    assert [file.name for file in files if asks.search(file.read_text(encoding="utf-8"))] == []


def test_skips_of_a_run_are_logged(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text(
        "from tests import skips\n"
        "def pytest_runtest_logreport(report): skips.note(report)\n"
        "def pytest_collectreport(report): skips.note(report)\n"
    )
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.skip(reason='marked')\ndef test_marked(): pass\n"
        "def test_inside(): pytest.skip('inside')\n"
        "@pytest.mark.xfail\ndef test_expected(): assert False\n"
        "def test_passes(): pass\n"
    )
    (tmp_path / "test_b.py").write_text(
        "import pytest\npytest.importorskip('no_such_module', reason='gone')\n"
    )
    monkeypatch.setenv("LED_KERNELS_SKIP_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(README.parent))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
        f"--rootdir={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    logged = [tuple(json.loads(row)) for row in (tmp_path / "log").read_text().splitlines()]
    assert sorted(logged) == [
        ("test_a.py::test_inside", "inside"),
        ("test_a.py::test_marked", "marked"),
        ("test_b.py", "gone"),
    ]


def test_a_row_replaces_that_of_the_same_releases():
    def row(torch, date):
        return as_row(dict(zip(COLUMNS, ["3.11.7", torch, "3.9.0", "5.24.0"], strict=False)) | {"date": date})

    text = "before\n<!-- matrix -->\n<!-- /matrix -->\nafter\n"
    first = update(text, [row("2.13.0+cpu", "2026-01-01"), row("2.15.0+cu132", "2026-01-02")])
    second = update(first, [row("2.15.1+cu132", "2026-01-03")])
    assert first.startswith("before\n<!-- matrix -->\n| Python | torch |")
    assert second.endswith("<!-- /matrix -->\nafter\n")
    assert row("2.13.0+cpu", "2026-01-01") in second
    assert row("2.15.1+cu132", "2026-01-03") in second
    assert "2.15.0" not in second
    of_other_tests = row("2.15.1+cu132", "2026-01-04").replace("–", "9 passed", 1)
    third = update(second, [of_other_tests])
    assert set(second.splitlines()) < set(third.splitlines())
    rows = [line for line in third.splitlines() if line.startswith("| 3")]
    assert len(rows) == 3
    assert third == update(text, rows[::-1])
    assert update(second, []) == second
