"""Opcodes one by one, on drawn bits and on the edges of each type, against Python's integers and torch."""

from __future__ import annotations

import inspect
import math
import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.emulation.ptx.assembly import run_ptx
from tests.emulation.ptx.faults import UnknownInstruction

LANES = 64
_EDGES = [0, 1, 2, 5, 31, 32, 33, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]
_EDGES += [0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF]


def integers(bits: int, seed: int) -> list[int]:
    """Unsigned values, about half of them edges."""
    generator = random.Random(seed)
    edges = [*_EDGES, 1 << bits - 1, (1 << bits) - 1]
    return [generator.choice([generator.choice(edges), generator.getrandbits(bits)]) for _ in range(LANES)]


def floats(seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    special = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 65504.0, 1e-3, 3e38]
    drawn = generator.standard_normal(LANES - len(special)) * 10.0 ** generator.integers(
        -4, 5, LANES - len(special)
    )
    return [float(np.float32(x)) for x in generator.permutation(np.concatenate([special, drawn]))]


def evaluate(body: str, operands: list[list[int]], width: int = 32) -> list[int]:
    """Runs ``body`` on operands in ``%rd10`` ``%rd11`` ..., ``%r10`` ..., ``%rs10`` ...; its result is ``%rd20``."""
    data = torch.tensor(np.array(operands, np.uint64).view(np.int64))  # [operands, lanes]
    out = torch.zeros(LANES, dtype=torch.int64)
    lines = ["mad.wide.u32 %rd30, %r0, 8, %rd0;", "mad.wide.u32 %rd31, %r0, 8, %rd1;"]
    for i in range(len(operands)):
        lines += [
            f"ld.global.b64 %rd{10 + i}, [%rd30+{8 * LANES * i}];",
            f"cvt.u32.u64 %r{10 + i}, %rd{10 + i};",
            f"cvt.u16.u64 %rs{10 + i}, %rd{10 + i};",
        ]
    lines += ["mov.b64 %rd20, 0;", "mov.b32 %r20, 0;", "mov.b16 %rs20, 0;", body]
    lines += {32: ["cvt.u64.u32 %rd20, %r20;"], 16: ["cvt.u64.u16 %rd20, %rs20;"], 64: []}[width]
    run_ptx("\n".join([*lines, "st.global.b64 [%rd31], %rd20;"]), data, out, threads=LANES)
    return [x & (2**64 - 1) for x in out.tolist()]


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def unsigned(x: int, bits: int = 32) -> int:
    return x & ((1 << bits) - 1)


def bits_of(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _extract(a: int, position: int, length: int, is_signed: bool) -> int:
    field = (signed(a) if is_signed else a) >> position & ((1 << length) - 1)
    return signed(field, length) if is_signed and length else field


INTEGER_OPCODES: dict[str, Callable[..., int]] = {
    "add.s32 %r20, %r10, %r11": lambda a, b: a + b,
    "sub.s32 %r20, %r10, %r11": lambda a, b: a - b,
    "mul.lo.s32 %r20, %r10, %r11": lambda a, b: a * b,
    "mul.hi.u32 %r20, %r10, %r11": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r20, %r10, %r11": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r20, %r10, %r11, %r12": lambda a, b, c: a * b + c,
    "min.s32 %r20, %r10, %r11": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r20, %r10, %r11": lambda a, b: max(a, b),
    "div.s32 %r20, %r10, 7": lambda a: _divide(signed(a), 7),
    "div.s32 %r20, %r10, -3": lambda a: _divide(signed(a), -3),
    "rem.s32 %r20, %r10, 7": lambda a: signed(a) - 7 * _divide(signed(a), 7),
    "div.u32 %r20, %r10, 7": lambda a: a // 7,
    "rem.u32 %r20, %r10, 7": lambda a: a % 7,
    "neg.s32 %r20, %r10": lambda a: -a,
    "abs.s32 %r20, %r10": lambda a: abs(signed(a)),
    "and.b32 %r20, %r10, %r11": lambda a, b: a & b,
    "or.b32 %r20, %r10, %r11": lambda a, b: a | b,
    "xor.b32 %r20, %r10, %r11": lambda a, b: a ^ b,
    "not.b32 %r20, %r10": lambda a: ~a,
    "and.b32 %r20, %r10, -64": lambda a: a & -64,
    "bfe.u32 %r20, %r10, 3, 4": lambda a: _extract(a, 3, 4, False),
    "bfe.s32 %r20, %r10, 5, 1": lambda a: _extract(a, 5, 1, True),
    "bfe.u32 %r20, %r10, 4, 28": lambda a: _extract(a, 4, 28, False),
    "bfi.b32 %r20, %r10, %r11, 4, 9": lambda a, b: (b & ~(511 << 4)) | (a & 511) << 4,
    "lop3.b32 %r20, %r10, %r11, %r12, 0xE8": lambda a, b, c: a & b | a & c | b & c,
    "lop3.b32 %r20, %r10, %r11, %r12, 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %r20, %r10, %r11, %r12, 0xE2": lambda a, b, c: (a & b) | (~b & c),
    "prmt.b32 %r20, %r10, %r11, 0x5410": lambda a, b: a & 0xFFFF | b << 16,
    "prmt.b32 %r20, %r10, %r11, 0x7632": lambda a, b: a >> 16 | b & 0xFFFF0000,
    "prmt.b32 %r20, %r10, %r11, 0x8321": lambda a, b: a >> 8 | (255 << 24 if a & 0x80 else 0),
    "shf.l.wrap.b32 %r20, %r10, %r11, 9": lambda a, b: ((b << 32 | a) << 9) >> 32,
    "shf.r.wrap.b32 %r20, %r10, %r11, 9": lambda a, b: (b << 32 | a) >> 9,
    "popc.b32 %r20, %r10": lambda a: a.bit_count(),
    "clz.b32 %r20, %r10": lambda a: 32 - a.bit_length(),
    "mov.b32 {%rs20, %rs21}, %r10; mov.b32 %r20, {%rs21, %rs20}": lambda a: a >> 16 | a << 16,
    "cvt.u32.u16 %r20, %rs10": lambda a: a & 0xFFFF,
    "cvt.s32.s16 %r20, %rs10": lambda a: signed(a, 16),
    "cvt.s32.s8 %r20, %r10": lambda a: signed(a, 8),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, %r10, %r11, %p1": lambda a, b: min(signed(a), signed(b)),
    "setp.lo.u32 %p1, %r10, %r11; selp.b32 %r20, %r10, %r11, %p1": lambda a, b: min(a, b),
    "setp.ge.u32 %p1, %r10, %r11; selp.b32 %r20, 1, 0, %p1": lambda a, b: a >= b,
    "setp.ne.b32 %p1, %r10, 5; selp.b32 %r20, 1, 0, %p1": lambda a: a != 5,
    "setp.gt.s32 %p2, %r10, 0; setp.lt.and.s32 %p1, %r11, 0, %p2; selp.b32 %r20, 1, 0, %p1": lambda a, b: (
        signed(b) < 0 < signed(a)
    ),
    "setp.eq.s32 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 2, %p1; @%p2 add.s32 %r20, %r20, 4": lambda a, b: (
        1 if a == b else 6
    ),
    "setp.gt.s32 %p1, %r10, -1; @!%p1 mov.b32 %r20, 7": lambda a: 7 if signed(a) < 0 else 0,
    "setp.gt.s32 %p1, %r10, -1; not.pred %p2, %p1; xor.pred %p3, %p1, %p2; selp.b32 %r20, 3, 4, %p3": lambda a: (
        3
    ),
}
SHIFTS: dict[str, Callable[[int, int], int]] = {
    "shl.b32 %r20, %r10, %r11": lambda a, n: a << n,
    "shr.u32 %r20, %r10, %r11": lambda a, n: a >> n,
    "shr.s32 %r20, %r10, %r11": lambda a, n: signed(a) >> n,
}
WIDE_OPCODES: dict[str, Callable[..., int]] = {
    "add.s64 %rd20, %rd10, %rd11": lambda a, b: a + b,
    "mul.lo.s64 %rd20, %rd10, %rd11": lambda a, b: a * b,
    "mul.wide.s32 %rd20, %r10, %r11": lambda a, b: signed(a) * signed(b),
    "mul.wide.u32 %rd20, %r10, %r11": lambda a, b: unsigned(a) * unsigned(b),
    "mad.wide.s32 %rd20, %r10, 2, %rd11": lambda a, b: signed(a) * 2 + b,
    "mad.wide.u32 %rd20, %r10, %r11, %rd10": lambda a, b: unsigned(a) * unsigned(b) + a,
    "mad.lo.s64 %rd20, %rd10, %rd11, %rd10": lambda a, b: a * b + a,
    "cvt.s64.s32 %rd20, %r10": lambda a: signed(a),
    "cvt.u64.u32 %rd20, %r10": lambda a: unsigned(a),
    "mov.b64 {%r20, %r21}, %rd10; mov.b64 %rd20, {%r21, %r20}": lambda a: a >> 32 | a << 32,
    "mov.b64 {_, %r21}, %rd10; cvt.u64.u32 %rd20, %r21": lambda a: a >> 32,
    "shl.b64 %rd20, %rd10, 7": lambda a: a << 7,
    "shr.u64 %rd20, %rd10, 32": lambda a: a >> 32,
    "shr.s64 %rd20, %rd10, 3": lambda a: signed(a, 64) >> 3,
    "setp.lt.s64 %p1, %rd10, %rd11; selp.b64 %rd20, %rd10, %rd11, %p1": lambda a, b: min(
        signed(a, 64), signed(b, 64)
    ),
    "setp.lt.u64 %p1, %rd10, %rd11; selp.b64 %rd20, 1, 0, %p1": lambda a, b: a < b,
}


@pytest.mark.parametrize("body", INTEGER_OPCODES)
def test_integers_of_32_bits(body):
    function = INTEGER_OPCODES[body]
    operands = [integers(32, seed) for seed in range(len(inspect.signature(function).parameters))]
    expected = [unsigned(int(function(*values))) for values in zip(*operands, strict=True)]
    assert evaluate(body + ";", operands) == expected


@pytest.mark.parametrize("body", SHIFTS)
def test_shifts_beyond_the_width_shift_everything_out(body):
    values, amounts = integers(32, 0), [i % 40 for i in range(LANES)]
    expected = [unsigned(SHIFTS[body](a, n)) for a, n in zip(values, amounts, strict=True)]
    assert evaluate(body + ";", [values, amounts]) == expected


@pytest.mark.parametrize("body", WIDE_OPCODES)
def test_integers_of_64_bits(body):
    function = WIDE_OPCODES[body]
    operands = [integers(64, seed) for seed in range(len(inspect.signature(function).parameters))]
    expected = [unsigned(int(function(*values)), 64) for values in zip(*operands, strict=True)]
    assert evaluate(body + ";", operands, width=64) == expected


def _number(function: Callable[..., float]) -> Callable[..., float]:
    """Computes in fp64 and rounds to fp32 once."""

    def rounded(*operands: float) -> float:
        return float(function(*(torch.tensor(x, dtype=torch.float64) for x in operands)).float())

    return rounded


FLOAT_OPCODES: dict[str, tuple[int, Callable[..., float]]] = {
    "add.f32 %r20, %r10, %r11": (2, _number(torch.add)),
    "sub.f32 %r20, %r10, %r11": (2, _number(torch.sub)),
    "mul.f32 %r20, %r10, %r11": (2, _number(torch.mul)),
    "fma.rn.f32 %r20, %r10, %r11, %r12": (3, _number(lambda a, b, c: a * b + c)),
    "max.f32 %r20, %r10, %r11": (2, _number(torch.fmax)),
    "min.f32 %r20, %r10, %r11": (2, _number(torch.fmin)),
    "max.NaN.f32 %r20, %r10, %r11": (2, _number(torch.maximum)),
    "neg.f32 %r20, %r10": (1, _number(torch.neg)),
    "abs.f32 %r20, %r10": (1, _number(torch.abs)),
    "div.full.f32 %r20, %r10, %r11": (2, _number(torch.div)),
    "rcp.approx.ftz.f32 %r20, %r10": (1, _number(torch.reciprocal)),
    "ex2.approx.ftz.f32 %r20, %r10": (1, _number(torch.exp2)),
    "lg2.approx.ftz.f32 %r20, %r10": (1, _number(torch.log2)),
    "sqrt.rn.f32 %r20, %r10": (1, _number(torch.sqrt)),
    "add.f32 %r20, %r10, 0fBFC00000": (1, _number(lambda a: a - 1.5)),
    "setp.lt.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (2, lambda a, b: float(a < b)),
    "setp.ltu.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (
        2,
        lambda a, b: float(not a >= b),
    ),
    "setp.ne.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (
        2,
        lambda a, b: float(a < b or a > b),
    ),
    "setp.neu.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (
        2,
        lambda a, b: float(a != b),
    ),
    "setp.num.f32 %p1, %r10, %r10; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (1, lambda a: float(a == a)),
    "setp.nan.f32 %p1, %r10, %r11; selp.f32 %r20, 0f3F800000, 0f00000000, %p1": (
        2,
        lambda a, b: float(a != a or b != b),
    ),
}


@pytest.mark.parametrize("body", FLOAT_OPCODES)
def test_floats(body):
    count, function = FLOAT_OPCODES[body]
    operands = [floats(seed) for seed in range(count)]
    expected = torch.tensor([function(*values) for values in zip(*operands, strict=True)])
    actual = torch.tensor(
        [float_of(x) for x in evaluate(body + ";", [[bits_of(x) for x in o] for o in operands])]
    )
    if ".ftz" in body:
        expected = torch.where(expected.abs() < torch.finfo(torch.float32).tiny, 0.0, expected)
    approximate = "approx" in body or "fma" in body
    rtol = 2**-22 if approximate else 0  # two units in the last place
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


def test_half_types_round_to_nearest_even():
    high, low = floats(0), floats(1)
    halfway = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-8, 2.0**-25]
    high[: len(halfway)] = halfway
    operands = [[bits_of(x) for x in high], [bits_of(x) for x in low]]
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        packed = torch.tensor(evaluate(f"cvt.rn.{name}x2.f32 %r20, %r10, %r11;", operands))
        halves = packed.to(torch.int32).view(torch.int16).view(-1, 2).view(dtype)
        expected = torch.tensor([low, high]).T.to(dtype)
        torch.testing.assert_close(halves, expected, rtol=0, atol=0, equal_nan=True)
        single = torch.tensor(evaluate(f"cvt.rn.{name}.f32 %rs20, %r10;", operands, width=16))
        torch.testing.assert_close(
            single.to(torch.int16).view(dtype), expected[:, 1], rtol=0, atol=0, equal_nan=True
        )
        back = evaluate(f"cvt.rn.{name}.f32 %rs20, %r10; cvt.f32.{name} %r20, %rs20;", operands)
        torch.testing.assert_close(
            torch.tensor([float_of(x) for x in back]), expected[:, 1].float(), rtol=0, atol=0, equal_nan=True
        )


def test_tf32_keeps_ten_bits_of_mantissa():
    values = [
        1 + 2**-11,
        1 + 2**-11 - 2**-23,
        -1 - 2**-11,
        1 + 3 * 2**-11,
        math.inf,
        0.0,
        3.14159274,
        1 + 2**-10,
    ]
    expected = [1 + 2**-10, 1.0, -1 - 2**-10, 1 + 2**-9, math.inf, 0.0, 3.140625, 1 + 2**-10]
    operands = [[bits_of(x) for x in values * (LANES // len(values))]]
    actual = evaluate("cvt.rna.tf32.f32 %r20, %r10;", operands)
    assert [float_of(x) for x in actual[: len(values)]] == expected


def test_conversions_between_integers_and_floats():
    values = integers(32, 3)
    as_float = evaluate("cvt.rn.f32.s32 %r20, %r10;", [values])
    assert [float_of(x) for x in as_float] == [float(np.float32(signed(x))) for x in values]
    numbers = [0.5, 1.5, -0.5, -2.7, 3e9, -3e9, math.nan, 7.0] * (LANES // 8)
    rounded = evaluate("cvt.rni.s32.f32 %r20, %r10;", [[bits_of(x) for x in numbers]])
    truncated = evaluate("cvt.rzi.s32.f32 %r20, %r10;", [[bits_of(x) for x in numbers]])
    assert [signed(x) for x in rounded[:8]] == [0, 2, 0, -3, 2**31 - 1, -(2**31), 0, 7]
    assert [signed(x) for x in truncated[:8]] == [0, 1, 0, -2, 2**31 - 1, -(2**31), 0, 7]


def test_votes():
    body = "setp.lt.u32 %p1, %r10, 5; mov.b32 %r1, -1; vote.sync.{}.pred %p2, %p1, %r1; selp.b32 %r20, 1, 0, %p2;"
    one_small, all_small = [9] * 31 + [4], [4] * 32
    for quantifier, expected in (("any", [1] * 64), ("all", [0] * 32 + [1] * 32)):
        assert evaluate(body.format(quantifier), [one_small + all_small]) == expected
    assert evaluate(body.format("any"), [[5] * 64]) == [0] * 64


def test_barriers_that_reduce():
    body = "setp.lt.u32 %p1, %r10, 5; bar.red.{}.pred %p2, 0, %p1; selp.b32 %r20, 1, 0, %p2;"
    for values, any_small, all_small in (([9] * 63 + [4], 1, 0), ([4] * 64, 1, 1), ([5] * 64, 0, 0)):
        assert evaluate(body.format("or"), [values]) == [any_small] * 64
        assert evaluate(body.format("and"), [values]) == [all_small] * 64


def test_subnormals_are_flushed_where_asked():
    operands = [[bits_of(2.0**-130)] * LANES, [bits_of(1.0)] * LANES]
    assert set(evaluate("mul.f32 %r20, %r10, %r11;", operands)) == {bits_of(2.0**-130)}
    assert set(evaluate("mul.ftz.f32 %r20, %r10, %r11;", operands)) == {0}
    assert set(evaluate("ex2.approx.ftz.f32 %r20, 0fC3020000;", operands)) == {0}  # exp2(-130)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %r20, %r10, %r11",
        "frobnicate.b32 %r20, %r10",
        "setp.lt.ftz.f32 %p1, %r10, %r11",
        "ld.local.b32 %r20, [%r10]",
        "atom.global.add.u32 %r20, [%rd10], %r11",
        "bar.sync 1, 64",
        "shfl.sync.bfly.b32 %r20, %r10, 1, 31, 0xffff",
        "mov.b32 %r1, 1; vote.sync.any.pred %p1, %p2, %r1",
        "cvta.to.shared.u64 %rd20, %rd10",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "cvt.rz.f16.f32 %rs20, %r10",
        "mov.u32 %r20, %clock",
        "bra $nowhere",
        "add.s32 %rs20, %rs10, %rs11",
    ],
)
def test_what_is_not_modelled_raises(instruction):
    with pytest.raises(UnknownInstruction):
        evaluate(instruction + ";", [integers(32, 0), integers(32, 1)])
