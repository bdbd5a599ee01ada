"""The gate: what got worse is named, what did not is not, and the command's status says which."""

import dataclasses

import pytest
import triton

from benchmarks.harness import table
from benchmarks.static import triton_kernels
from benchmarks.static.cases import Case, everything, short_list
from benchmarks.static.table import Row, violations, worse, write_sorted

ROW = Row(
    op="banded_forward",
    kernel="_banded_forward_kernel",
    target="sm_80",
    dtype="bfloat16",
    head_dim=64,
    dropout=False,
    tma=False,
    num_globals=1,
    config="BLOCK_M=128",
    num_warps=8,
    registers=200,
    stack=0,
    spills=0,
    shared=65536,
    shared_limit=166912,
    resident_blocks=1,
    tensor="HMMA 256",
    instructions=2000,
    loops="masked 6.9, interior 4.7",
    interior=4.7,
    masked=6.9,
    triton=triton.__version__,
)


def test_rows_survive_the_file(tmp_path):
    amd = dataclasses.replace(
        ROW, target="gfx942", dropout=True, resident_blocks=None, interior=None, instructions=None
    )
    path = tmp_path / "table.csv"
    write_sorted(path, [amd, ROW])
    assert table.read(path, Row) == sorted([amd, ROW], key=lambda row: row.key)


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 209},
        {"stack": 8},
        {"spills": 1},
        {"resident_blocks": 0},
        {"interior": 4.81},
        {"masked": 7.05},
        {"instructions": 2041},
        {"tensor": ""},
        {"interior": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_worse_figures_are_named(change):
    (problem,) = worse(dataclasses.replace(ROW, **change), ROW)
    (name,) = change
    assert name in problem
    assert "_banded_forward_kernel sm_80 bfloat16 head_dim 64" in problem


def test_a_shorter_tile_of_queries_is_named():
    shorter = dataclasses.replace(ROW, config="BLOCK_M=64")
    assert worse(shorter, ROW) == [f"{ROW}: query_rows 64, committed 128"]
    assert worse(ROW, shorter) == []
    others = [dataclasses.replace(row, op="banded_backward") for row in (shorter, ROW)]
    assert worse(*others) == []


def test_better_figures_and_noise_are_not_named():
    better = dataclasses.replace(
        ROW, registers=208, resident_blocks=2, interior=4.75, masked=5.0, tensor="HMMA 128"
    )
    assert worse(better, ROW) == []
    assert worse(ROW, dataclasses.replace(ROW, instructions=None)) == []


@pytest.mark.parametrize(
    "change", [{"stack": 8}, {"spills": 3}, {"shared": 166913}, {"note": "loops are unknown"}]
)
def test_violations_need_no_table(change):
    assert violations(ROW) == []
    (problem,) = violations(dataclasses.replace(ROW, **change))
    assert str(next(iter(change.values()))) in problem


def test_figures_of_another_triton_are_not_compared():
    old = dataclasses.replace(ROW, triton="3.0.0", registers=100)
    assert triton_kernels.compare([ROW], [old]) == [
        f"the table is of Triton 3.0.0, this is {triton.__version__}"
    ]


def test_rows_without_a_committed_one_are_named():
    (problem,) = triton_kernels.compare([dataclasses.replace(ROW, head_dim=16)], [ROW])
    assert problem.endswith("not in the table")


def test_the_command_writes_then_checks(tmp_path, capsys):
    path = tmp_path / "table.csv"
    one_case = [
        "--op",
        "banded_forward",
        "--target",
        "sm_80",
        "--dtype",
        "float16",
        "--jobs",
        "1",
        "--table",
        str(path),
    ]
    assert triton_kernels.main(one_case) == 0
    assert triton_kernels.main([*one_case, "--check"]) == 0
    (row,) = table.read(path, Row)
    table.write(path, [dataclasses.replace(row, registers=row.registers - 9)])
    capsys.readouterr()
    assert triton_kernels.main([*one_case, "--check"]) == 1
    assert f"registers {row.registers}, committed {row.registers - 9}" in capsys.readouterr().err


def test_a_filter_that_fits_nothing_is_an_error(capsys):
    assert triton_kernels.main(["--head-dim", "3"]) == 2
    assert "no case" in capsys.readouterr().err


def test_lists_of_cases():
    short, long = short_list(), everything()
    assert len(set(short)) == len(short) < 25
    assert set(short) <= set(long)
    assert len(set(long)) == len(long)
    assert str(Case("banded_forward", "sm_90", dropout=True, tma=True)) == (
        "banded_forward sm_90 bfloat16 head_dim 64, dropout, tma"
    )
