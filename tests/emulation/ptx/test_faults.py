"""Every fault is raised where it is due, and not where it is not."""

from __future__ import annotations

import pytest
import torch

from tests.emulation.ptx.assembly import run_ptx
from tests.emulation.ptx.faults import (
    DivergenceFault,
    EndlessLoop,
    MemoryFault,
    PtxFault,
    RaceFault,
    UnwrittenRead,
)

ADDRESS = "mad.wide.u32 %rd10, %r0, 4, %rd0;"


def words(n: int = 32) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


class TestGlobalMemory:
    @pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%rd10{}]", "st.global.b32 [%rd10{}], %r0"])
    @pytest.mark.parametrize(("offset", "message"), [("+4", "at byte 128"), ("+-4", "at byte -4")])
    def test_out_of_bounds(self, access, offset, message):
        with pytest.raises(MemoryFault, match=f"{message} of p0, which holds 128"):
            run_ptx(f"{ADDRESS} {access.format(offset)};", words())
        run_ptx(f"{ADDRESS} {access.format('')};", words())

    def test_lanes_that_are_off_are_not_checked(self):
        body = ADDRESS + "setp.lt.u32 %p1, %r0, 20; mov.b32 %r1, 7; @%p1 ld.global.b32 %r1, [%rd10];"
        body += "mad.wide.u32 %rd11, %r0, 4, %rd1; st.global.b32 [%rd11], %r1;"
        out = torch.zeros(32, dtype=torch.int32)
        run_ptx(body, words(20), out)
        assert out.tolist() == [*range(20), *[7] * 12]
        with pytest.raises(MemoryFault):
            run_ptx(body.replace("@%p1 ld", "ld"), words(20), out)

    def test_misaligned(self):
        with pytest.raises(MemoryFault, match="misaligned load of 8 bytes"):
            run_ptx("mad.wide.u32 %rd10, %r0, 4, %rd0; ld.global.v2.b32 {%r1, %r2}, [%rd10];", words(64))

    def test_wild_address(self):
        with pytest.raises(MemoryFault, match="in no tensor"):
            run_ptx("mov.b64 %rd10, 64; ld.global.b32 %r1, [%rd10];", words())

    def test_outside_of_the_view(self):
        """k's rows between q's rows belong to the storage, but not to q."""
        q = words(64).view(32, 2)[:, 0]
        run_ptx("mad.wide.u32 %rd10, %r0, 8, %rd0; ld.global.b32 %r1, [%rd10];", q)
        with pytest.raises(MemoryFault, match="outside of the view p0"):
            run_ptx("mad.wide.u32 %rd10, %r0, 8, %rd0; ld.global.b32 %r1, [%rd10+4];", q)

    def test_lanes_that_store_different_values_in_one_place(self):
        run_ptx("st.global.b32 [%rd0], 5;", words())
        with pytest.raises(RaceFault, match="two lanes"):
            run_ptx("st.global.b32 [%rd0], %r0;", words())

    def test_ctas_that_share_what_one_stores(self):
        # CTAs that run one after the other (128 of 32 lanes run together)
        store = f"mov.u32 %r1, %ctaid.x; shr.u32 %r1, %r1, 7; {ADDRESS} st.global.b32 [%rd10], "
        run_ptx(store + "%r0;", words(), grid=(200, 1, 1))
        with pytest.raises(RaceFault, match="two CTAs"):
            run_ptx(store + "%r1;", words(), grid=(200, 1, 1))
        load = "mad.wide.u32 %rd11, %r1, 4, %rd0; st.global.b32 [%rd11], 9; ld.global.b32 %r2, [%rd10];"
        with pytest.raises(RaceFault, match="another CTA"):
            run_ptx("mov.u32 %r1, %ctaid.x; mov.b64 %rd10, %rd0;" + load, words(), grid=(2, 1, 1))


class TestParameters:
    @pytest.mark.parametrize(
        ("load", "message"),
        [
            ("ld.param.b64 %rd1, [p0+8]", "outside of the parameters, which hold 8"),
            ("ld.param.b64 %rd1, [p0+-8]", "outside of the parameters"),
            ("ld.param.b64 %rd1, [p0+4]", "misaligned"),
        ],
    )
    def test_out_of_bounds_and_misaligned(self, load, message):
        with pytest.raises(MemoryFault, match=message):
            run_ptx(f"{load};", words())

    def test_parts_of_a_parameter(self):
        out = torch.zeros(2, dtype=torch.int64)
        body = (
            "mov.b64 %rd1, p0; ld.param.u32 %r1, [p0]; ld.param.u32 %r2, [%rd1+4]; mov.b64 %rd2, {%r1, %r2};"
        )
        run_ptx(body + "st.global.b64 [%rd0], %rd0; st.global.b64 [%rd0+8], %rd2;", out)
        assert out[0] == out[1] != 0


class TestSharedMemory:
    WORD = "shl.b32 %r1, %r0, 2;"

    @pytest.mark.parametrize(("offset", "message"), [("+4", "at byte 128"), ("+-4", "at byte")])
    def test_out_of_bounds(self, offset, message):
        with pytest.raises(MemoryFault, match=message):
            run_ptx(f"{self.WORD} st.shared.b32 [%r1{offset}], %r0;", shared_bytes=128)

    def test_misaligned(self):
        with pytest.raises(MemoryFault, match="misaligned"):
            run_ptx(f"{self.WORD} st.shared.v2.b32 [%r1], {{%r0, %r0}};", shared_bytes=256)

    def test_never_written(self):
        with pytest.raises(UnwrittenRead, match="never written"):
            run_ptx(f"{self.WORD} ld.shared.b32 %r2, [%r1];", shared_bytes=128)

    EXCHANGE = (
        "shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; {barrier} xor.b32 %r2, %r0, {mask}; shl.b32 %r2, %r2, 2;"
        "ld.shared.b32 %r3, [%r2]; mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10], %r3;"
    )

    @pytest.mark.parametrize("mask", [1, 32])
    def test_a_barrier_is_needed_between_warps_alone(self, mask):
        out = words(64) * 0
        run_ptx(self.EXCHANGE.format(barrier="bar.sync 0;", mask=mask), out, threads=64, shared_bytes=256)
        assert out.tolist() == [i ^ mask for i in range(64)]
        without = self.EXCHANGE.format(barrier="", mask=mask)
        if mask == 1:
            run_ptx(without, out, threads=64, shared_bytes=256)
        else:
            with pytest.raises(RaceFault, match="no barrier"):
                run_ptx(without, out, threads=64, shared_bytes=256)

    def test_a_barrier_is_needed_before_overwriting_what_others_load(self):
        body = self.EXCHANGE.format(barrier="bar.sync 0;", mask=32) + "{barrier} st.shared.b32 [%r1], 7;"
        run_ptx(body.format(barrier="bar.sync 0;"), words(64), threads=64, shared_bytes=256)
        with pytest.raises(RaceFault, match="no barrier"):
            run_ptx(body.format(barrier=""), words(64), threads=64, shared_bytes=256)

    def test_warps_that_store_different_values_in_one_place(self):
        run_ptx("st.shared.b32 [global_smem], 5;", threads=64, shared_bytes=16)
        run_ptx("st.shared.b32 [global_smem], %r0;", threads=32, shared_bytes=16)  # one of them stays
        with pytest.raises(RaceFault, match="two warps"):
            run_ptx("st.shared.b32 [global_smem], %r0;", threads=64, shared_bytes=16)


class TestAsyncCopies:
    COPY = (
        "shl.b32 %r1, %r0, 4; mad.wide.u32 %rd10, %r0, 16, %rd0;"
        "setp.lt.u32 %p1, %r0, {lanes}; selp.b32 %r2, {size}, 0, %p1;"
        "cp.async.cg.shared.global [%r1], [%rd10], 16, %r2; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r1+512], [%rd10], 16, %r2; cp.async.commit_group;"
        "{wait} ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1+{offset}];"
        "mad.wide.u32 %rd11, %r0, 16, %rd1; st.global.v4.b32 [%rd11], {{%r4, %r5, %r6, %r7}};"
    )

    def run(self, wait="cp.async.wait_group 0;", offset=0, lanes=32, size=16, rows=32):
        out = words(128) * 0 - 1
        body = self.COPY.format(wait=wait, offset=offset, lanes=lanes, size=size)
        run_ptx(body, words(4 * rows), out, shared_bytes=1024)
        return out.view(32, 4)

    @pytest.mark.parametrize("offset", [0, 512])
    def test_groups_land_when_waited_for(self, offset):
        assert torch.equal(self.run(offset=offset), words(128).view(32, 4))

    def test_the_last_groups_may_be_left_in_flight(self):
        assert torch.equal(self.run("cp.async.wait_group 1;"), words(128).view(32, 4))
        with pytest.raises(UnwrittenRead, match="not been waited for"):
            self.run("cp.async.wait_group 1;", offset=512)
        with pytest.raises(UnwrittenRead, match="not been waited for"):
            self.run("cp.async.wait_group 2;")
        with pytest.raises(UnwrittenRead, match="not been waited for"):
            self.run("")

    def test_source_size_zero_reads_nothing_and_fills_with_zeros(self):
        rows = self.run(lanes=20, rows=20)
        assert torch.equal(rows[:20], words(80).view(20, 4))
        assert (rows[20:] == 0).all()
        with pytest.raises(MemoryFault):
            self.run(lanes=21, rows=20)

    def test_part_of_a_row(self):
        assert torch.equal(self.run(size=8)[:, :2], words(128).view(32, 4)[:, :2])
        assert (self.run(size=8)[:, 2:] == 0).all()

    def test_landing_is_no_barrier(self):
        """What a warp's copy brought, another one sees only after a barrier."""
        body = (
            "shl.b32 %r1, %r0, 2; mad.wide.u32 %rd10, %r0, 4, %rd0; cp.async.ca.shared.global [%r1], [%rd10], 4;"
            "cp.async.commit_group; cp.async.wait_group 0; {} xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1];"
        )
        run_ptx(body.format("bar.sync 0;"), words(64), threads=64, shared_bytes=256)
        with pytest.raises(RaceFault, match="no barrier"):
            run_ptx(body.format(""), words(64), threads=64, shared_bytes=256)

    def test_overwriting_a_copy_in_flight(self):
        with pytest.raises(RaceFault, match="still to write"):
            self.run("st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};")


class TestControlFlow:
    # lane i of CTA c adds 1 (c + i mod 5) times; multiples of 3 then subtract 100
    LOOPS = """
        mov.u32 %r1, %ctaid.x; rem.u32 %r2, %r0, 5; add.s32 %r2, %r2, %r1; mov.b32 %r3, 0;
    $LOOP:
        setp.eq.s32 %p1, %r2, 0;
        @%p1 bra $DONE;
        add.s32 %r3, %r3, 1;
        sub.s32 %r2, %r2, 1;
        bra.uni $LOOP;
    $DONE:
        rem.u32 %r4, %r0, 3; setp.ne.s32 %p2, %r4, 0;
        @%p2 bra $STORE;
        sub.s32 %r3, %r3, 100;
    $STORE:
        {} mad.lo.s32 %r6, %r1, 64, %r0; mad.wide.u32 %rd10, %r6, 4, %rd0; st.global.b32 [%rd10], %r3;
    """

    @pytest.mark.parametrize("ctas", [1, 3, 130])
    def test_lanes_part_and_meet_again(self, ctas):
        out = words(64 * ctas) * 0
        run_ptx(self.LOOPS.format("bar.sync 0;"), out, threads=64, grid=(ctas, 1, 1))
        expected = [c + i % 5 - (100 if i % 3 == 0 else 0) for c in range(ctas) for i in range(64)]
        assert out.tolist() == expected

    def test_lanes_that_return_early(self):
        body = "setp.gt.u32 %p1, %r0, 9; @%p1 bra $END; {} mad.wide.u32 %rd10, %r0, 4, %rd0;"
        body += "st.global.b32 [%rd10], 7; $END:"
        out = words() * 0
        run_ptx(body.format(""), out)
        assert out.tolist() == [7] * 10 + [0] * 22
        with pytest.raises(DivergenceFault, match="barrier"):
            run_ptx(body.format("bar.sync 0;"), out)

    @pytest.mark.parametrize(
        "collective",
        [
            "bar.sync 0",
            "shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1",
            "vote.sync.any.pred %p2, %p1, -1",
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r0]",
        ],
    )
    def test_collectives_in_divergent_code(self, collective):
        body = f"setp.gt.u32 %p1, %r0, 9; @%p1 bra $END; mov.b32 %r3, 0; {collective}; $END: mov.b32 %r1, 0;"
        with pytest.raises(DivergenceFault):
            run_ptx(body, shared_bytes=512)

    def test_a_barrier_that_a_warp_skips(self):
        body = "setp.gt.u32 %p1, %r0, 31; @%p1 bra $END; shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;"
        body += "{} $END: mov.b32 %r1, 0;"
        run_ptx(body.format(""), threads=64)
        with pytest.raises(DivergenceFault, match="barrier"):
            run_ptx(body.format("bar.sync 0;"), threads=64)

    def test_a_loop_without_end(self):
        with pytest.raises(EndlessLoop):
            run_ptx("$LOOP: setp.eq.s32 %p1, %r0, 99; @%p1 bra $DONE; bra.uni $LOOP; $DONE: mov.b32 %r1, 0;")

    def test_a_register_that_was_never_written(self):
        with pytest.raises(PtxFault, match="%r9 is read before"):
            run_ptx("add.s32 %r1, %r9, 1;")

    def test_messages_name_the_instruction(self):
        with pytest.raises(MemoryFault, match=r"line \d+: ld.global.b32 %r1, \[%rd10\+4\]"):
            run_ptx(f"{ADDRESS} ld.global.b32 %r1, [%rd10+4];", words())
