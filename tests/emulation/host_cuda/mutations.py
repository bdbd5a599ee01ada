"""Small faults planted in a copy of the kernels' sources, of the kinds that a kernel's author makes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.emulation.host_cuda.build import ROOT, build_module, kernel_unit, module_units

HEAD_DIM = 64  # of the object that a mutation changes


@dataclass(frozen=True)
class Mutation:
    """Changes ``csrc/cuda/<file>``, whose text holds ``before`` once, as the kernel ``kernel`` sees it."""

    name: str
    kernel: str  # banded_forward, ...
    file: str
    before: str
    after: str
    dtype: str = "bfloat16"

    @property
    def op(self) -> str:
        return self.kernel.split("_")[0]

    def build(self, folder: Path) -> Path:
        """Copies the sources to the folder, plants the fault -> a module in which it is in that kernel alone."""
        csrc = folder / self.name
        shutil.copytree(ROOT / "csrc", csrc)
        path = csrc / "cuda" / self.file
        text = path.read_text(encoding="utf-8")
        count = text.count(self.before)
        if count != 1:
            raise ValueError(f"{self.file} holds {count} times, not once: {self.before}")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")
        mutant, original = (kernel_unit(self.kernel, HEAD_DIM, root) for root in (csrc, ROOT / "csrc"))
        # a linker keeps the first of several copies of an inline function
        return build_module([mutant, *(unit for unit in module_units() if unit != original)])


_BARRIER = "__syncthreads();  // the tile is there for all, and all are done with the one before"
_WAIT = f"wait_for_copies<0>();\n      {_BARRIER}"

MUTATIONS = (
    Mutation("missing_barrier", "banded_forward", "tile_walk.cuh", _BARRIER, ""),
    Mutation("loose_wait", "banded_forward", "tile_walk.cuh", _WAIT, _WAIT.replace("<0>", "<1>")),
    Mutation(
        "one_stage_for_two",
        "banded_forward",
        "tile_walk.cuh",
        "load(tile_at(i + 1), is_masked, (i + 1) & 1);",
        "load(tile_at(i + 1), is_masked, i & 1);",
    ),
    Mutation(
        "missing_barrier_before_load",
        "banded_forward",
        "tile_walk.cuh",
        "__syncthreads();\n      load(tile_at(i), is_masked, 0);",
        "load(tile_at(i), is_masked, 0);",
        dtype="float32",
    ),
    Mutation(
        "swapped_operand_registers",
        "banded_forward",
        "tensor_core.cuh",
        "pack<T>(p.at(2 * k + i / 2, 2 * m + i % 2, 0), p.at(2 * k + i / 2, 2 * m + i % 2, 1))",
        "pack<T>(p.at(2 * k + i % 2, 2 * m + i / 2, 0), p.at(2 * k + i % 2, 2 * m + i / 2, 1))",
    ),
    Mutation(
        "swapped_pair",
        "banded_forward",
        "tensor_core.cuh",
        "pack<T>(p.at(2 * k + i / 2, 2 * m + i % 2, 0), p.at(2 * k + i / 2, 2 * m + i % 2, 1))",
        "pack<T>(p.at(2 * k + i / 2, 2 * m + i % 2, 1), p.at(2 * k + i / 2, 2 * m + i % 2, 0))",
    ),
    Mutation(
        "swapped_lane_coordinates",
        "banded_forward",
        "fragment.cuh",
        "threadIdx.x % kWarpSize / 4",
        "threadIdx.x % 8",
    ),
    Mutation(
        "matrices_in_another_order",
        "banded_forward",
        "tensor_core.cuh",
        "row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2",
        "row = lane % 8 + lane / 8 % 2 * 8, half = lane / 16",
    ),
    Mutation("missing_barrier_of_backward", "banded_backward", "tile_walk.cuh", _BARRIER, ""),
    Mutation("loose_wait_of_globals", "global_forward", "tile_walk.cuh", _WAIT, _WAIT.replace("<0>", "<1>")),
    Mutation(
        "swapped_columns_of_backward",
        "banded_backward",
        "backward.cuh",
        "const int query = start + 8 * n + 2 * lane_in_group() + e;",
        "const int query = start + 8 * n + lane_group();",
    ),
    Mutation(
        "missing_barrier_before_load_of_backward",
        "global_backward",
        "tile_walk.cuh",
        "__syncthreads();\n      load(tile_at(i), is_masked, 0);",
        "load(tile_at(i), is_masked, 0);",
        dtype="float32",
    ),
    Mutation(
        "shuffle_across_rows",
        "banded_forward",
        "fragment.cuh",
        "return x + __shfl_xor_sync(kAllLanes, x, 2);",
        "return x + __shfl_xor_sync(kAllLanes, x, 4);",
    ),
)
