"""Binding: every instruction becomes, once, a function that executes it on a wave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import OPERATIONS, comparison
from .faults import UnknownInstruction
from .formats import TYPES, fp32_to_tf32
from .operands import Binder, items
from .parser import Immediate, Instruction, Operand, Vector
from .warp import distribute_matrices, multiply_accumulate, reduce_warps, shuffle_source

if TYPE_CHECKING:
    from .machine import Wave

Step = Callable[["Wave"], None]

# Hints about caches, and orderings that program order already gives.
_HINTS = {"ca", "cg", "cs", "cv", "wb", "wt", "nc", "weak", "volatile", "L1::evict_first", "L1::evict_last"}
_HINTS |= {"L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"}
_WITHOUT_EFFECT = {"fence", "membar", "griddepcontrol"}
_MMA_SHAPES = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": "bf16x2",
    "m16n8k16.row.col.f32.f16.f16.f32": "f16x2",
    "m16n8k8.row.col.f32.bf16.bf16.f32": "bf16x2",
    "m16n8k8.row.col.f32.f16.f16.f32": "f16x2",
    "m16n8k8.row.col.f32.tf32.tf32.f32": "tf32",
    "m16n8k4.row.col.f32.tf32.tf32.f32": "tf32",
}
_ALL_LANES = np.uint32(0xFFFFFFFF)
_FLOAT_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
_REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def bind(instruction: Instruction, binder: Binder) -> Step:
    """
    Raises:
        UnknownInstruction: the opcode, one of its modifiers, or an operand is not modelled.
    """
    if instruction.opcode in OPERATIONS:
        return _bind_operation(instruction, binder)
    if instruction.name in _WITHOUT_EFFECT or instruction.opcode == "bar.warp.sync":
        return lambda wave: None
    if instruction.name not in _BINDERS:
        raise UnknownInstruction(f"unknown opcode {instruction.opcode}")
    return _BINDERS[instruction.name](instruction, binder)


def _bind_operation(instruction: Instruction, binder: Binder) -> Step:
    function, result, types = OPERATIONS[instruction.opcode]
    destination, *sources = instruction.operands
    write = binder.writer(destination, result, instruction)
    reads = [binder.reader(operand, t) for operand, t in zip(sources, types, strict=True)]
    if len(reads) == 2:  # most instructions; saves a list each
        first, second = reads
        return lambda wave: write(wave, function(first(wave), second(wave)))
    return lambda wave: write(wave, function(*[read(wave) for read in reads]))


def _bind_setp(instruction: Instruction, binder: Binder) -> Step:
    """``setp.lt{.and|.or|.xor}.type p{|q}, a, b{, c}``: ``q`` gets the negated comparison, combined alike."""
    compare_name, *combine_name, type_name = instruction.modifiers
    compare = comparison(compare_name, type_name)
    if compare is None or combine_name not in ([], ["and"], ["or"], ["xor"]):
        raise UnknownInstruction(f"unknown comparison {instruction.opcode}")
    destination, a, b, *other = instruction.operands
    writes = [binder.writer(x, "pred", instruction) for x in items(destination)]
    read_a, read_b = binder.reader(a, type_name), binder.reader(b, type_name)
    if not combine_name:
        if len(writes) == 1:
            (write,) = writes
            return lambda wave: write(wave, compare(read_a(wave), read_b(wave)))
        combine, read_other = (lambda x, _: x), (lambda wave: None)
    else:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine_name[0]]
        read_other = binder.reader(other[0], "pred")

    def step(wave: Wave) -> None:
        holds, third = compare(read_a(wave), read_b(wave)), read_other(wave)
        for write, value in zip(writes, (holds, ~holds), strict=False):
            write(wave, combine(value, third))

    return step


def _bind_mov(instruction: Instruction, binder: Binder) -> Step:
    """Copies, packs ``{a, b}`` into a wider register, or unpacks."""
    destination, source = instruction.operands
    type_name = instruction.opcode.removeprefix("mov.")
    if isinstance(source, Vector):
        part = f"b{int(type_name[1:]) // len(source.items)}"
        reads = [binder.reader(x, part) for x in source.items]
        write = binder.writer(destination, type_name, instruction)
        storage = TYPES[type_name].storage

        def pack(wave: Wave) -> None:
            parts = np.stack([np.broadcast_to(read(wave), wave.size) for read in reads], axis=1)
            write(wave, parts.view(storage)[:, 0])

        return pack
    if isinstance(destination, Vector):
        part = f"b{int(type_name[1:]) // len(destination.items)}"
        writes = [binder.writer(x, part, instruction) for x in destination.items]
        read, storage = binder.reader(source, type_name), TYPES[part].storage

        def unpack(wave: Wave) -> None:
            parts = read(wave).view(storage).reshape(-1, len(writes))
            for i, write in enumerate(writes):
                write(wave, parts[:, i].copy())

        return unpack
    if type_name not in TYPES:
        raise UnknownInstruction(f"unknown move {instruction.opcode}")
    read, write = binder.reader(source, type_name), binder.writer(destination, type_name, instruction)
    return lambda wave: write(wave, read(wave))


def _bind_cvt(instruction: Instruction, binder: Binder) -> Step:
    *modifiers, target, source = instruction.modifiers
    destination, *operands = instruction.operands
    write = binder.writer(destination, "b32" if target == "tf32" else target, instruction)
    reads = [binder.reader(x, source) for x in operands]
    kinds = (TYPES[target].is_float, TYPES[source].is_float)
    if target in ("f16x2", "bf16x2") and (modifiers, source) == (["rn"], "f32"):
        high, low = reads
        return lambda wave: write(wave, np.stack(np.broadcast_arrays(low(wave), high(wave)), axis=-1))
    (read,) = reads
    if target == "tf32" and source == "f32" and modifiers in (["rna"], ["rn"]):
        ties_away = modifiers == ["rna"]
        return lambda wave: write(wave, fp32_to_tf32(read(wave), ties_away=ties_away))
    if kinds == (False, True) and len(modifiers) == 1 and modifiers[0] in _FLOAT_TO_INTEGER:
        rounded, limits = _FLOAT_TO_INTEGER[modifiers[0]], np.iinfo(_value_dtype(target))

        def to_integer(wave: Wave) -> None:
            values = rounded(read(wave).astype(np.float64))
            inside = np.clip(np.nan_to_num(values, nan=0.0), limits.min, limits.max)
            write(wave, np.where(values >= limits.max, limits.max, inside.astype(limits.dtype)))

        return to_integer
    to_nearest = modifiers == ["rn"] and kinds != (False, False)
    if not to_nearest and modifiers:
        raise UnknownInstruction(f"unknown conversion {instruction.opcode}")
    dtype = _value_dtype(target)
    return lambda wave: write(wave, read(wave).astype(dtype))


def _value_dtype(type_name: str) -> np.dtype:
    return TYPES[type_name].decode(np.zeros(1, TYPES[type_name].storage)).dtype


def _bind_ld(instruction: Instruction, binder: Binder) -> Step:
    space, count, type_name = _memory_access(instruction)
    destination, source = instruction.operands
    writes = [binder.writer(x, type_name, instruction) for x in items(destination)]
    if len(writes) != count:
        raise UnknownInstruction(f"{count} destinations expected")
    active = binder.active(instruction)
    address = binder.address_reader(source, "u32" if space == "shared" else "u64")
    ptx_type = TYPES[type_name]
    nbytes = count * ptx_type.storage.itemsize

    def step(wave: Wave) -> None:
        lanes = wave.lanes_where(active)
        rows = wave.load(space, address(wave)[lanes], nbytes, lanes)
        values = np.zeros((wave.size, count), ptx_type.storage)
        values[lanes] = rows.view(ptx_type.storage)
        for i, write in enumerate(writes):
            write(wave, ptx_type.decode(values[:, i].copy()))

    return step


def _bind_st(instruction: Instruction, binder: Binder) -> Step:
    space, count, type_name = _memory_access(instruction)
    destination, source = instruction.operands
    reads = [binder.reader(x, f"b{TYPES[type_name].storage.itemsize * 8}") for x in items(source)]
    if len(reads) != count or space == "param":
        raise UnknownInstruction(f"{count} sources expected")
    active = binder.active(instruction)
    address = binder.address_reader(destination, "u64" if space == "global" else "u32")

    def step(wave: Wave) -> None:
        lanes = wave.lanes_where(active)
        values = np.stack([np.broadcast_to(read(wave), wave.size) for read in reads], axis=1)[lanes]
        wave.store(space, address(wave)[lanes], values.view(np.uint8), lanes)

    return step


def _memory_access(instruction: Instruction) -> tuple[str, int, str]:
    """(state space, elements, type) of a load or store"""
    *modifiers, type_name = instruction.modifiers
    spaces = [x for x in modifiers if x in ("global", "shared", "param")]
    spaces += ["shared" for x in modifiers if x == "shared::cta"]
    vectors = [int(x[1]) for x in modifiers if x in ("v2", "v4")]
    rest = [
        x for x in modifiers if x not in _HINTS | {"global", "shared", "shared::cta", "param", "v2", "v4"}
    ]
    if len(spaces) != 1 or len(vectors) > 1 or rest or type_name not in TYPES:
        raise UnknownInstruction(f"unknown memory access {instruction.opcode}")
    return spaces[0], (vectors or [1])[0], type_name


def _bind_cp(instruction: Instruction, binder: Binder) -> Step:
    """cp.async and its groups."""
    opcode = instruction.opcode
    if opcode == "cp.async.commit_group":
        return lambda wave: wave.commit_copies()
    if opcode == "cp.async.wait_group":
        (pending,) = instruction.operands
        return lambda wave: wave.wait_for_copies(pending.bits)
    if opcode == "cp.async.wait_all":
        return lambda wave: (wave.commit_copies(), wave.wait_for_copies(0))
    hints = [x for x in instruction.modifiers if x not in {"async", "shared", "shared::cta", "global"}]
    if not opcode.startswith("cp.async.c") or not set(hints) <= _HINTS:
        raise UnknownInstruction(f"unknown copy {opcode}")
    destination, source, nbytes, *size = instruction.operands
    if not isinstance(nbytes, Immediate) or nbytes.bits not in (4, 8, 16):
        raise UnknownInstruction("cp.async of 4, 8 or 16 bytes expected")
    active = binder.active(instruction)
    to, origin = binder.address_reader(destination, "u32"), binder.address_reader(source, "u64")
    read_size = binder.reader(size[0] if size else nbytes, "u32")

    def step(wave: Wave) -> None:
        lanes = wave.lanes_where(active)
        sizes = np.broadcast_to(read_size(wave), wave.size)[lanes]
        wave.copy_async(to(wave)[lanes], origin(wave)[lanes], nbytes.bits, sizes, lanes)

    return step


def _bind_bar(instruction: Instruction, binder: Binder) -> Step:
    """``bar.sync 0`` and ``bar.red.{and|or}.pred p, 0, a``; named and partial barriers are not modelled."""
    if instruction.opcode in ("bar.red.or.pred", "bar.red.and.pred"):
        destination, number, source = instruction.operands
        if number != Immediate(0) or instruction.predicate:
            raise UnknownInstruction(f"unknown barrier {instruction.text}")
        write, read = binder.writer(destination, "pred", instruction), binder.reader(source, "pred")
        reduction = np.logical_or if "or" in instruction.modifiers else np.logical_and
        return lambda wave: write(wave, wave.reducing_barrier(reduction, read(wave)))
    number = instruction.operands[0] if instruction.operands else None
    whole = instruction.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned")
    if not whole or number != Immediate(0) or len(instruction.operands) > 1 or instruction.predicate:
        raise UnknownInstruction(f"unknown barrier {instruction.text}")
    return lambda wave: wave.barrier()


def _bind_shfl(instruction: Instruction, binder: Binder) -> Step:
    match instruction.modifiers:
        case ["sync", ("up" | "down" | "bfly" | "idx") as mode, "b32"]:
            destination, source, lane, clamp, members = instruction.operands
        case _:
            raise UnknownInstruction(f"unknown shuffle {instruction.opcode}")
    expect_whole_warps = _whole_warps(instruction, members, binder)
    write, *write_in_range = [
        binder.writer(x, t, instruction) for x, t in zip(items(destination), ("b32", "pred"), strict=False)
    ]
    reads = [binder.reader(x, "u32") for x in (source, lane, clamp)]

    def step(wave: Wave) -> None:
        expect_whole_warps(wave)
        values, lane, clamp = (np.broadcast_to(read(wave), wave.size) for read in reads)
        origin, in_range = shuffle_source(mode, lane, clamp)
        write(wave, values[origin])
        for write_flag in write_in_range:
            write_flag(wave, in_range)

    return step


def _bind_vote(instruction: Instruction, binder: Binder) -> Step:
    match instruction.modifiers:
        case ["sync", ("any" | "all") as name, "pred"]:
            destination, source, members = instruction.operands
        case _:
            raise UnknownInstruction(f"unknown vote {instruction.opcode}")
    expect_whole_warps = _whole_warps(instruction, members, binder)
    write, read = binder.writer(destination, "pred", instruction), binder.reader(source, "pred")
    reduction = {"any": np.logical_or, "all": np.logical_and}[name]

    def step(wave: Wave) -> None:
        expect_whole_warps(wave)
        write(wave, reduce_warps(reduction, np.broadcast_to(read(wave), wave.size)))

    return step


def _bind_cvta(instruction: Instruction, binder: Binder) -> Step:
    """Global addresses are generic ones; other spaces are not modelled."""
    if instruction.opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
        raise UnknownInstruction(f"unknown conversion of an address {instruction.opcode}")
    destination, source = instruction.operands
    read, write = binder.reader(source, "u64"), binder.writer(destination, "u64", instruction)
    return lambda wave: write(wave, read(wave))


def _bind_redux(instruction: Instruction, binder: Binder) -> Step:
    match instruction.modifiers:
        case ["sync", name, ("s32" | "u32" | "b32") as type_name] if name in _REDUCTIONS:
            destination, source, members = instruction.operands
        case _:
            raise UnknownInstruction(f"unknown reduction {instruction.opcode}")
    expect_whole_warps = _whole_warps(instruction, members, binder)
    write, read = binder.writer(destination, type_name, instruction), binder.reader(source, type_name)

    def step(wave: Wave) -> None:
        expect_whole_warps(wave)
        write(wave, reduce_warps(_REDUCTIONS[name], np.broadcast_to(read(wave), wave.size)))

    return step


def _bind_ldmatrix(instruction: Instruction, binder: Binder) -> Step:
    match instruction.modifiers:
        case ["sync", "aligned", "m8n8", ("x1" | "x2" | "x4") as number, *transposed, "shared", "b16"]:
            count = int(number[1])
        case _:
            raise UnknownInstruction(f"unknown matrix load {instruction.opcode}")
    if transposed not in ([], ["trans"]) or instruction.predicate:
        raise UnknownInstruction(f"unknown matrix load {instruction.text}")
    destination, source = instruction.operands
    writes = [binder.writer(x, "b32", instruction) for x in items(destination)]
    address = binder.address_reader(source, "u32")

    def step(wave: Wave) -> None:
        wave.expect_whole_warps()
        lanes = wave.first_of_each_warp(8 * count)
        rows = wave.load("shared", address(wave)[lanes], 16, lanes)
        for write, value in zip(writes, distribute_matrices(rows, count, bool(transposed)), strict=True):
            write(wave, value)

    return step


def _bind_mma(instruction: Instruction, binder: Binder) -> Step:
    type_name = _MMA_SHAPES.get(instruction.opcode.removeprefix("mma.sync.aligned."))
    if type_name is None or instruction.predicate:
        raise UnknownInstruction(f"unknown mma {instruction.opcode}")
    d, a, b, c = (items(x) for x in instruction.operands)
    writes = [binder.writer(x, "f32", instruction) for x in d]
    reads = [
        [binder.reader(x, t) for x in fragment]
        for fragment, t in ((a, type_name), (b, type_name), (c, "f32"))
    ]

    def step(wave: Wave) -> None:
        wave.expect_whole_warps()
        result = multiply_accumulate(*([read(wave) for read in fragment] for fragment in reads))
        for write, value in zip(writes, result, strict=True):
            write(wave, value)

    return step


def _whole_warps(instruction: Instruction, members: Operand, binder: Binder) -> Callable[[Wave], None]:
    """Checks that all lanes of the warps are named, and are there."""
    if instruction.predicate:
        raise UnknownInstruction(f"only whole warps are modelled: {instruction.text}")
    read_members = binder.reader(members, "u32")

    def check(wave: Wave) -> None:
        if (read_members(wave) != _ALL_LANES).any():
            raise UnknownInstruction("only whole warps are modelled")
        wave.expect_whole_warps()

    return check


_BINDERS: dict[str, Callable[[Instruction, Binder], Step]] = {
    "setp": _bind_setp,
    "mov": _bind_mov,
    "cvt": _bind_cvt,
    "ld": _bind_ld,
    "st": _bind_st,
    "cp": _bind_cp,
    "bar": _bind_bar,
    "barrier": _bind_bar,
    "shfl": _bind_shfl,
    "vote": _bind_vote,
    "cvta": _bind_cvta,
    "redux": _bind_redux,
    "ldmatrix": _bind_ldmatrix,
    "mma": _bind_mma,
}
