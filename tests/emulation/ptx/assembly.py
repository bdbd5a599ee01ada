"""Hand-written PTX for tests of the interpreter."""

from __future__ import annotations

from torch import Tensor

from tests.emulation.ptx.machine import compiled, execute
from tests.emulation.ptx.memory import GlobalMemory

_HEADER = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<80>;
    .reg .b64 %rd<40>;
    mov.u32 %r0, %tid.x;
{loads}
{body}
    ret;
}}
"""


def run_ptx(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
) -> None:
    """Runs ``body`` with the thread's number in ``%r0`` and the tensors' addresses in ``%rd0``, ``%rd1`` ..."""
    names = [f"p{i}" for i in range(len(tensors))]
    ptx = _HEADER.format(
        parameters=", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in names),
        threads=threads,
        loads="\n".join(f"    ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names)),
        body=body,
    )
    memory = GlobalMemory()
    addresses = {name: memory.add_tensor(name, x) for name, x in zip(names, tensors, strict=True)}
    execute(compiled(ptx), grid, addresses, memory, shared_bytes)
