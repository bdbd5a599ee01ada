"""The readers of PTX and machine code and the models, on small fixed inputs whose answers are known."""

from collections import Counter

import pytest
from aot_toys import launch_two_loops

from benchmarks.harness.shapes import Shape
from benchmarks.static import cycle_model, executed, l2_model, ptx_trace, sass
from benchmarks.static.control_flow import FlowGraph, Instruction
from benchmarks.static.fake_driver import captured_launches
from benchmarks.static.gpus import GPUS

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


def test_costliest_path_enters_just_the_loops_that_run():
    graph = sass.flow_graph(SASS)
    first, second = sass.loops(graph)
    outside = 2 + 1  # MOV and the guard, EXIT
    assert executed.instructions_of_program(graph, (3, 2)) == outside + 3 * first.size + 2 * second.size
    assert executed.instructions_of_program(graph, (0, 1)) == outside + second.size
    with pytest.raises(executed.UnknownLoops):
        executed.instructions_of_program(graph, (1, 0))  # nothing leads around the second


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


@pytest.fixture(scope="module")
def two_loops():
    with captured_launches("sm_80") as launches:
        launch_two_loops(3, [0, 5, 2, 0])
    return launches[0]


def test_iterations_are_those_of_the_programs(two_loops):
    trace = ptx_trace.PtxTrace(two_loops)
    assert [trace.iterations((i, 0, 0)) for i in range(4)] == [[3, 0], [3, 5], [3, 2], [3, 0]]


def test_executed_instructions_of_a_launch(two_loops):
    graph = sass.flow_graph(sass.disassemble(two_loops.kernel.asm["cubin"]))
    masked, interior = sass.loops(graph)
    execution = executed.execute(two_loops, graph)
    assert execution.programs == Counter({(3, 0): 2, (3, 5): 1, (3, 2): 1})
    assert execution.mean_iterations == [3, 7 / 4]
    in_loops = 8 * (4 * 3 * masked.size + 7 * interior.size)
    everything = 8 * 4 * sum(len(block.instructions) for block in graph.blocks)
    assert in_loops < execution.instructions < in_loops + everything


def test_a_branch_on_computed_data_is_not_guessed(two_loops):
    graph, trace = sass.flow_graph(SASS), ptx_trace.PtxTrace(two_loops)
    with pytest.raises(executed.UnknownLoops, match="in PTX"):
        executed.execute(two_loops, graph)
    trace._memory.storages = []
    with pytest.raises(ptx_trace.UnknownBranch, match="outside of the launch's tensors"):
        trace.iterations((0, 0, 0))


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


def _loop(**counts):
    instructions = [Instruction(name.replace("_", ".")) for name, n in counts.items() for _ in range(n)]
    return sass.Loop(0, tuple(instructions))


def test_cycle_model_bound_by_exponentials():
    """A 128 x 64 tile of head_dim 64 on H100: 512 cycles of products, 544 of exponentials."""
    loop = _loop(HGMMA_64x64x16_F32_BF16=16, MUFU_EX2=68, FFMA=64)
    cycles = cycle_model.pipe_cycles(loop, GPUS["sm_90"].rates)
    assert (cycles["tensor"], cycles["special"], cycles["fma"]) == (512, 544, 64)
    share = cycle_model.tensor_share(loop, loop.tensor_macs / sass.HMMA_MACS, GPUS["sm_90"].rates)
    assert share == pytest.approx(0.94, abs=0.005)


def test_cycle_model_bound_by_issue_and_compares():
    rates = GPUS["sm_80"].rates
    assert cycle_model.pipe_cycles(_loop(HMMA_16816=64), rates)["tensor"] == 512
    assert cycle_model.tensor_share(_loop(HMMA_16816=64, LDSM=960), 64, rates) == 0.5
    assert cycle_model.tensor_share(_loop(HMMA_16816=64, ISETP=512), 64, rates) == 0.5
    assert (
        cycle_model.tensor_share(_loop(HMMA_16816=128), 64, rates) == 0.5
    )  # half of the products for nothing


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


def test_traffic_with_and_without_a_cache():
    shape = Shape(seqlen=1024, heads=2, head_dim=64, window=128, global_index=())
    row = 64 * 2
    once = l2_model.traffic_ratio(shape, 128, 64, resident=4, l2=2**30)
    assert once == pytest.approx(1 + 4 / (4 * row))  # lse
    # without a cache all read their band: 8 tiles of 128 + 2 * 128 rows, 128 fewer at both ends
    band = 8 * 384 - 2 * 128
    uncached = l2_model.traffic_ratio(shape, 128, 64, resident=4, l2=0)
    assert uncached == pytest.approx((2 * 1024 + 2 * band) / (4 * 1024) + 4 / (4 * row))
