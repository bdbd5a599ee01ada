"""Operands say what an instruction reads and writes, bound once: readers and writers of a wave's registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .faults import PtxFault, UnknownInstruction
from .formats import STORAGE, TYPES, PtxType
from .parser import Address, Entry, Immediate, Instruction, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Wave

Reader = Callable[["Wave"], np.ndarray]
Writer = Callable[["Wave", np.ndarray], None]

_SPECIAL_REGISTERS = ("tid", "ntid", "ctaid", "nctaid", "laneid", "warpid")


class Binder:
    """Turns the operands of one kernel's instructions into functions of a wave."""

    def __init__(self, entry: Entry) -> None:
        self._storage = {name: STORAGE[type_name] for name, type_name in entry.registers.items()}
        # dynamic shared memory starts at 0, as the parameter space does
        self._addresses = dict.fromkeys(entry.shared_memory, 0)
        self._addresses |= {name: place.start for name, place in entry.parameters.items()}

    def reader(self, operand: Operand, type_name: str) -> Reader:
        """Values of an operand as ``type_name``, [lanes] or, for a constant, [1]."""
        ptx_type = TYPES[type_name]
        if isinstance(operand, Register):
            return self._register_reader(operand.name, ptx_type)
        if isinstance(operand, Immediate):
            constant = ptx_type.decode(_bits(operand.bits, ptx_type.storage))
            return lambda wave: constant
        if isinstance(operand, Symbol) and operand.name in self._addresses:
            start = ptx_type.decode(_bits(self._addresses[operand.name], ptx_type.storage))
            return lambda wave: start
        if isinstance(operand, Symbol) and operand.name.lstrip("%").partition(".")[0] in _SPECIAL_REGISTERS:
            name = operand.name.lstrip("%")
            return lambda wave: ptx_type.decode(wave.special(name).astype(ptx_type.storage))
        raise UnknownInstruction(f"cannot read {operand} as {type_name}")

    def writer(self, operand: Operand, type_name: str, instruction: Instruction) -> Writer:
        """Writes values of a type into a register, at least as wide, where the instruction's predicate is on."""
        if operand == Symbol("_"):
            return lambda wave, values: None
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"cannot write to {operand}")
        name, storage, active = operand.name, self._storage[operand.name], self.active(instruction)
        encode = self._widening_encoder(TYPES[type_name], storage)

        def write(wave: Wave, values: np.ndarray) -> None:
            bits = encode(values)
            if len(bits) != wave.size:
                bits = np.repeat(bits, wave.size)
            if active is not None:
                bits = np.where(active(wave), bits, wave.register_or_poison(name, storage))
            wave.registers[name] = bits

        return write

    def active(self, instruction: Instruction) -> Reader | None:
        """Lanes where the instruction's predicate is on; None without a predicate."""
        if instruction.predicate is None:
            return None
        predicate = self.reader(instruction.predicate, "pred")
        return (lambda wave: ~predicate(wave)) if instruction.negated else predicate

    def address_reader(self, operand: Operand, type_name: str) -> Reader:
        """Byte addresses, [lanes]."""
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"expected an address, found {operand}")
        base, dtype = self.reader(operand.base, type_name), TYPES[type_name].storage
        offset = _bits(operand.offset, dtype)
        return lambda wave: np.broadcast_to(base(wave) + offset, (wave.size,))

    def _register_reader(self, name: str, ptx_type: PtxType) -> Reader:
        storage = self._storage[name]
        if storage.itemsize < ptx_type.storage.itemsize:
            raise UnknownInstruction(f"{name} is narrower than {ptx_type.name}")
        decode, narrow = ptx_type.decode, ptx_type.storage

        def read(wave: Wave) -> np.ndarray:
            try:
                return decode(wave.registers[name])
            except KeyError:
                raise PtxFault(f"register {name} is read before it is written") from None

        def read_narrow(wave: Wave) -> np.ndarray:
            return decode(wave.registers[name].astype(narrow))

        return read if storage == narrow else read_narrow

    @staticmethod
    def _widening_encoder(ptx_type: PtxType, storage: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
        encode = ptx_type.encode
        if storage == ptx_type.storage:
            return encode
        if storage.itemsize < ptx_type.storage.itemsize or ptx_type.name == "pred":
            raise UnknownInstruction(
                f"{ptx_type.name} does not fit a register of {8 * storage.itemsize} bits"
            )
        if ptx_type.is_signed:
            signed = np.dtype(f"i{storage.itemsize}")
            return lambda values: values.astype(signed).view(storage)
        return lambda values: encode(values).astype(storage)


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector, or the operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def _bits(value: int, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.array([bool(value)])
    return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], dtype)
