"""This module reads what LLVM made of a kernel for an AMD GPU, from its assembly text and the metadata at its end."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """Holds vector registers per thread, spills of them, bytes of scratch memory per thread, and matrix instructions.

    Scalar registers spill to lanes of vector registers, which costs no memory and is not counted.
    """

    registers: int
    spills: int
    scratch: int
    mfma: Counter[str]


def resources(assembly: str) -> Resources:
    def metadata(name: str) -> int:
        return int(re.search(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE)[1])

    return Resources(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),
        scratch=metadata("private_segment_fixed_size"),
        mfma=Counter(re.findall(r"^\s+(v_mfma_\w+)", assembly, re.MULTILINE)),
    )
