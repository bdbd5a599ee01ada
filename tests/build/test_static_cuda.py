"""The report on the CUDA kernels' machine code: what it reads from small texts, and what its gates name."""

import dataclasses

import pytest

from benchmarks.harness import table
from benchmarks.static import cuda_kernels, sass
from benchmarks.static.cuda_figures import Row, rows_of
from benchmarks.static.cuda_kernels import differences, violations
from benchmarks.static.table import write_sorted

FORWARD_64 = (  # of an element and of dropout
    "_ZN3led4cuda21banded_forward_kernelI"
    "NS0_18TensorCoreProductsINS0_{}ELi64ELi4ELi64ELi4ELb0EEELb{}EEEvNS0_9ArgumentsE"
)
GLOBAL_FORWARD_64 = (
    "_ZN3led4cuda21global_forward_kernelI"
    "NS0_18TensorCoreProductsINS0_4HalfELi64ELi2ELi64ELi4ELb0EEEEEvNS0_9ArgumentsE"
)
HALF, BFLOAT16 = "4Half", "8BFloat16"
DKDV_128 = "_ZN3led4cuda18banded_dkdv_kernelINS0_11FmaProductsILi128ELi1ELi32ELi4EEELb0EEEvNS0_9ArgumentsE"
SUM_SPLITS = (
    "_ZN3led4cuda24banded_sum_splits_kernelINS0_11FmaProductsILi128ELi1ELi32ELi4EEEEEvNS0_9ArgumentsE"
)

RESOURCES = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:254 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:888 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:168 STACK:32 SHARED:0 LOCAL:0 CONSTANT[0]:888 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ROW = Row(
    kernel="banded_forward",
    target="sm_80",
    element="bfloat16",
    head_dim=64,
    dropout=False,
    rows=128,
    columns=64,
    warps=4,
    registers=254,
    stack=0,
    spills=0,
    shared=49152,
    resident_blocks=2,
    hmma=256,
    interior_size=618,
    interior_hmma=128,
    interior_mask=8,
    interior=4.83,
    masked=7.77,
    nvcc="13.0",
)
FMA_ROW = dataclasses.replace(
    ROW,
    element="float32",
    hmma=0,
    interior_size=None,
    interior_hmma=None,
    interior_mask=None,
    interior=None,
    masked=None,
)


def function(name: str, *body: str) -> str:
    """As nvdisasm prints one: labels end in a colon, the rest are instructions."""
    lines = [line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in (*body, "EXIT")]
    return "\n".join(
        (f'\t.section\t.text.{name},"ax",@progbits', "\t.align\t128", f".text.{name}:", *lines, "")
    )


def forward(name: str, *within_interior: str, opcode: str = "HMMA.16816.F32", count: int = 128) -> str:
    """A masked loop, in which gathering is a loop behind a branch, and an interior loop."""
    products = [f"{opcode} R4, R8, R10, R4"] * count
    exponentials = ["MUFU.EX2 R3, R3"] * 64
    masks = ["ISETP.GT.AND P1, PT, R0, R1, PT", "FSEL R3, R3, -INF , P1"] * 64
    gather = [
        *("@!P3 BRA `(.L_load)", "MOV R5, R6", ".L_gather:", "LDGSTS [R5], [R6]", "@P4 BRA `(.L_gather)"),
        *("BRA `(.L_loaded)", ".L_load:", "LDGSTS [R5], [R6]", ".L_loaded:"),
    ]
    masked = [".L_masked:", *gather, *products, *masks, *exponentials, "@P0 BRA `(.L_masked)"]
    rescale = ["@P2 BRA `(.L_same)", "FMUL R4, R4, R3", ".L_same:"]
    interior = [
        ".L_interior:",
        *products,
        *exponentials,
        *rescale,
        *within_interior,
        "@P0 BRA `(.L_interior)",
    ]
    return function(name, *masked, *interior)


def figures(*texts: str, target: str = "sm_80") -> list[Row]:
    text = f"\t.target\t{target}\n" + "".join(texts)
    used = sass.Resources(registers=168, stack=0, local=0, shared=0)
    return rows_of(text, dict.fromkeys(sass.functions(text), used), "13.0")


def test_resources_of_every_function():
    assert sass.parse_resources(RESOURCES) == {
        "first": sass.Resources(254, 0, 0, 0),
        "second": sass.Resources(168, 32, 0, 0),
    }


def test_figures_of_a_tuned_kernel():
    (row,) = figures(forward(FORWARD_64.format(HALF, 0)))
    assert (row.kernel, row.target, row.element, row.head_dim, row.dropout) == (
        "banded_forward", "sm_80", "float16", 64, False,
    )  # fmt: skip
    assert (row.rows, row.columns, row.warps) == (128, 64, 4)
    assert row.shared == 2 * 64 * (128 + 2 * 2 * 64)
    assert (row.hmma, row.tile_hmma, row.spills) == (256, 128, 0)
    size = 128 + 64 + 2 + 1  # products, exponentials, the rescaling and its branch, the loop's own
    assert (row.interior_size, row.interior_hmma, row.interior_mask) == (size, 128, 0)
    assert row.interior == round(size / 128, 2)
    # of the masked loop all but what leads to the gathering, it, and what follows it alone
    assert row.masked == round((1 + 1 + 128 + 2 * 64 + 64 + 1) / 128, 2)
    assert violations(row) == []


def test_two_instructions_of_sm_75_are_one_hmma():
    (row,) = figures(forward(FORWARD_64.format(HALF, 0), opcode="HMMA.1688.F32", count=256), target="sm_75")
    assert (row.hmma, row.interior_hmma) == (512, 128)
    assert row.interior == round((256 + 64 + 2 + 1) / 128, 2)
    assert row.shared_limit == 64 * 1024


def test_kernels_that_are_left_out():
    trap, sums = function(FORWARD_64.format(BFLOAT16, 0), "BPT.TRAP 0x1"), function(SUM_SPLITS)
    (row,) = figures(trap, sums, forward(FORWARD_64.format(HALF, 0)), target="sm_75")
    assert row.element == "float16"
    (row,) = figures(trap, sums, target="sm_80")
    assert [problem.rsplit(": ")[-1] for problem in violations(row)] == [
        "no tensor-core instruction",
        "None instructions per HMMA in the interior loop, above 5.0",
    ]


def test_multiply_adds_have_a_row_without_loops():
    (row,) = figures(function(DKDV_128, "STL [R1], R2", "LDL R2, [R1]", "FFMA R1, R2, R3, R1"))
    assert (row.element, row.rows, row.columns, row.warps, row.hmma) == ("float32", 32, 32, 4, 0)
    assert row.shared == 4 * 128 * (2 * 32 + 2 * 32)
    assert row.spills == 2
    assert row.interior is None
    assert violations(row) == []  # only tuned kernels may not


def test_a_loop_of_draws_is_not_counted_as_if_it_ran_once():
    draws = [".L_draw:", "IMAD R1, R2, R3, R4", "@P5 BRA `(.L_draw)"]
    (row,) = figures(forward(FORWARD_64.format(HALF, 1), *draws))
    assert row.dropout
    assert row.interior is None
    assert row.interior_size == 128 + 64 + 2 + 1 + 2
    assert violations(row) == []


def test_draws_behind_a_branch_are_not_counted():
    draws = ["@P6 BRA `(.L_kept)", ".L_draw:", "IMAD R1, R2, R3, R4", "@P5 BRA `(.L_draw)"]
    keep = ["FSEL R3, R3, RZ, P1"] * 64
    (row,) = figures(forward(GLOBAL_FORWARD_64, *draws, *keep, ".L_kept:", count=64))
    assert (row.kernel, row.dropout, row.rows) == ("global_forward", True, 64)
    assert row.interior_size == 64 + 64 + 2 + 1 + (1 + 2 + 64)
    assert row.interior == round((64 + 64 + 2 + 1 + 1) / 64, 2)
    assert row.interior_mask == 0
    assert violations(row) == []


def test_a_mask_in_the_interior_loop_shows():
    (row,) = figures(forward(FORWARD_64.format(HALF, 0), *["FSEL R3, R3, -INF , P1"] * 64))
    assert row.interior_hmma is None
    assert "its loops are not one with masks and one without" in violations(row)[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 8}, "8 B of stack, 0 accesses to it"),
        ({"spills": 2}, "0 B of stack, 2 accesses to it"),
        ({"shared": 163 * 1024 + 1}, "166913 B of shared memory, the target has 166912"),
        ({"interior": 5.01}, "5.01 instructions per HMMA in the interior loop, above 5.0"),
        ({"interior_hmma": 127}, "127 HMMA in the interior loop, a tile takes 128"),
        ({"hmma": 0}, "no tensor-core instruction"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_limits_are_named(change, sentence):
    assert violations(ROW) == []
    broken = dataclasses.replace(ROW, **change)
    assert violations(broken) == [
        f"banded_forward sm_80 bfloat16 head_dim 64, tile 128x64, 4 warps: {sentence}"
    ]


def test_limits_that_hold_elsewhere():
    assert violations(dataclasses.replace(ROW, target="sm_90", interior=9.0)) == []
    assert violations(dataclasses.replace(ROW, dropout=True, interior=None)) == []
    assert violations(dataclasses.replace(FMA_ROW, stack=64, spills=20)) == []
    assert violations(dataclasses.replace(FMA_ROW, target="sm_75", shared=65537)) != []


def test_every_difference_is_named():
    other = dataclasses.replace(ROW, head_dim=32)
    assert differences([ROW, other], [other, ROW]) == []
    (problem,) = differences([ROW], [dataclasses.replace(ROW, registers=255)])
    assert problem.endswith("4 warps: registers 254, committed 255")
    assert sorted(problem.split(": ")[1] for problem in differences([ROW], [other])) == [
        "in the table, not in the extension",
        "not in the table",
    ]


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "table.csv"
    write_sorted(path, [FMA_ROW, ROW])
    assert table.read(path, Row) == [ROW, FMA_ROW]


def test_the_committed_table_keeps_to_the_limits():
    rows = table.read(cuda_kernels.DEFAULT, Row)
    assert [problem for row in rows for problem in violations(row)] == []
    assert {row.target for row in rows} == {"sm_75", "sm_80", "sm_90"}
    assert len({row.key for row in rows}) == len(rows)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command over one "cubin", with its table written; further figures can be set as attributes."""

    class Now:
        row = ROW

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, *_):
            return [[Now.row]]

    monkeypatch.setattr(sass, "cubins", lambda _: [b""])
    monkeypatch.setattr(cuda_kernels, "ProcessPoolExecutor", Pool)
    options = ["--extension", "_C.so", "--table", str(tmp_path / "table.csv")]
    assert cuda_kernels.main(options) == 0
    return Now, [*options, "--check"]


def test_the_command_fails_on_a_difference(command, capsys):
    now, check = command
    assert cuda_kernels.main(check) == 0
    now.row = dataclasses.replace(ROW, registers=200)
    assert cuda_kernels.main(check) == 1
    assert "registers 200, committed 254" in capsys.readouterr().err


def test_another_nvcc_is_held_to_the_limits_alone(command, capsys):
    now, check = command
    now.row = dataclasses.replace(ROW, registers=200, nvcc="12.9")
    assert cuda_kernels.main(check) == 0
    assert (
        "compiled by nvcc 12.9, the table is of 13.0: only the limits are checked" in capsys.readouterr().out
    )
    now.row = dataclasses.replace(now.row, stack=8)
    assert cuda_kernels.main(check) == 1
    assert "8 B of stack" in capsys.readouterr().err


def test_an_extension_without_gpu_code_is_an_error(capsys):
    library = cuda_kernels._parse([]).extension.with_name("api.py")
    assert cuda_kernels.main(["--check", "--extension", str(library)]) == 2
    assert "api.py" in capsys.readouterr().err
