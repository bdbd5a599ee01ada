"""The readers of machine code, on small fixed inputs whose answers are known."""

import pytest
from aot_toys import launch_two_loops

from benchmarks.static import sass
from benchmarks.static.control_flow import END, FlowGraph
from benchmarks.static.fake_driver import captured_launches
from benchmarks.static.gpus import GPUS
from benchmarks.static.sass import Instruction

SASS = """
kernel:
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/               @P2 FSEL R3, R3, -INF , P3 ;
        /*0060*/                   BSSY B0, `(.L_x_0) ;
        /*0070*/               @P1 CALL.REL.NOINC `(.L_x_0) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0090*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*00a0*/                   FSEL R3, R3, R4, P3 ;
        /*00b0*/                   MUFU.EX2 R2, R2 ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*00d0*/                   BRA.U UP0, `(.L_x_0) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4] ;
        /*0100*/              @!P0 BRA `(.L_x_3) ;
        /*0110*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*0120*/                   BRA `(.L_x_9);
        /*0130*/                   NOP;
"""


def test_loops_of_machine_code():
    graph = sass.flow_graph(SASS)
    assert sum(len(block.instructions) for block in graph.blocks) == 18  # without what follows the last jump
    first, second = sass.loops(graph)
    assert [i.name for i in first.instructions] == ["HMMA", "MUFU", "MUFU", "FSEL", "BSSY", "CALL", "BRA"]
    assert first.tensor_macs == 16 * 8 * 16
    assert (first.exponentials, first.mask_instructions, first.mask_per_score) == (2, 1, 0.5)
    # the spin on a barrier, placed behind the end, belongs to the loop that waits
    assert [i.name for i in second.instructions] == [
        "HMMA",
        "FSEL",
        "MUFU",
        "BRA",
        "BRA",
        "SYNCS",
        "BRA",
        "BRA",
    ]
    assert second.tensor_macs == 16 * 8 * 8
    assert second.mask_instructions == 0  # its select moves data


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("HMMA.16816.F32", 2048),
        ("HMMA.1688.F32.TF32", 1024),
        ("HMMA.1684.F32.TF32", 512),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_multiply_adds_of_an_instruction(opcode, macs):
    assert sass.tensor_macs(Instruction(opcode)) == macs


def test_dominators_tell_loops_from_jumps_back():
    def jump(label, conditional=True):
        return Instruction("BRA", targets=(label,), falls_through=conditional)

    nop, end = Instruction("NOP"), Instruction("EXIT", falls_through=False)
    # the last block jumps back into the middle, which can also be reached without it
    graph = FlowGraph([jump("out"), nop, "middle", nop, end, "out", nop, jump("middle", False)])
    assert graph.natural_loops == {}
    nested = FlowGraph(["outer", nop, "inner", nop, jump("inner"), nop, jump("outer"), end])
    assert list(nested.natural_loops.values()) == [{0, 1, 2}, {1}]
    assert list(nested.innermost_loops(lambda i: i is nop)) == [1]


def test_post_dominators_are_where_paths_meet_again():
    def jump(label):
        return Instruction("BRA", targets=(label,))

    nop, leave = Instruction("NOP"), Instruction("EXIT", targets=(END,))
    # a branch around block 1, which may end; then block 2, and the end, which is number 3
    graph = FlowGraph([jump("out"), nop, leave, "out", nop])
    assert graph.post_dominators == [{0, 3}, {1, 3}, {2, 3}]
    endless = FlowGraph(
        [jump("in"), leave, "in", nop, Instruction("BRA", targets=("in",), falls_through=False)]
    )
    assert endless.post_dominators[2] == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def two_loops():
    with captured_launches("sm_80") as launches:
        launch_two_loops(3, [0, 5, 2, 0])
    return launches[0]


def test_loops_of_a_good_kernel(two_loops):
    cubin = two_loops.kernel.asm["cubin"]
    masked, interior = sass.loops(sass.flow_graph(sass.disassemble(cubin)))
    assert sass.kinds([masked, interior]) == ["masked", "interior"]
    assert interior.hmmas(two_loops) == 2 * 128 * 64 * 64 / sass.HMMA_MACS / 8
    assert interior.size / 64 < 5.5 < masked.size / 64
    assert sass.resources(cubin).stack == 0


def test_a_mask_in_the_interior_loop_shows():
    with captured_launches("sm_80") as launches:
        launch_two_loops(3, [5], mask_all=True)
    loops = sass.loops(sass.flow_graph(sass.disassemble(launches[0].kernel.asm["cubin"])))
    assert sass.kinds(loops) == ["masked", "masked"]


def test_a_spill_shows():
    with captured_launches("sm_80") as launches:
        launch_two_loops(3, [5], num_warps=2)
    assert sass.resources(launches[0].kernel.asm["cubin"]).stack > 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_75", 128, 32 * 1024, 4, 2),
        ("sm_80", 255, 0, 8, 1),
        ("sm_80", 128, 0, 8, 2),
        ("sm_80", 128, 163 * 1024, 8, 1),
        ("sm_80", 32, 0, 1, 32),
        ("sm_86", 32, 0, 8, 6),
        ("sm_90", 168, 114 * 1024, 4, 1),
        ("sm_90", 168, 113 * 1024, 4, 2),
    ],
)
def test_resident_blocks(arch, registers, shared, warps, blocks):
    """As NVIDIA's occupancy calculator has them."""
    assert GPUS[arch].resident_blocks(registers, shared, warps) == blocks
