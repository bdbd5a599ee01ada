"""Here are the suites that are timed, and the CSVs that hold their published runs."""

from __future__ import annotations

from benchmarks.harness.table import RESULTS
from benchmarks.suites import attention, compiled, documents, encoder, generation, training_step

SUITES = {
    suite.name: suite
    for suite in (
        attention.SUITE,
        encoder.SUITE,
        generation.SUITE,
        compiled.SUITE,
        training_step.SUITE,
        documents.SUITE,
    )
}

TOGETHER = (attention.SUITE, encoder.SUITE)
"""What ``python -m benchmarks`` measures when no suite is named, in one run."""

CPU = RESULTS / "cpu.csv"
"""The CSV of that run."""

COMMITTED = (CPU, generation.SUITE.out, compiled.SUITE.out, training_step.SUITE.out)
