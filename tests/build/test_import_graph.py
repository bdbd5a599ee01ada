"""Layers point one way: no circle of imports, no arrow from a lower layer up to a higher one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.build.import_graph import against_order, arrows, circles

ROOT = Path(__file__).parents[2]
PACKAGES = ("led_kernels", "led_model", "benchmarks")

# The highest first; a package stands for all that it holds but what is named itself. A new module of led_kernels counts
# as the package, near the top, until it gets a place here.
LAYERS = (
    "benchmarks.__main__",
    "benchmarks.report",
    "benchmarks.tune",
    "benchmarks.suites",
    "benchmarks.static",
    "benchmarks.harness",
    "benchmarks",
    "led_model.__main__",
    "led_model.cli",
    "led_model.training",
    "led_model.batch",
    "led_model",
    "led_model.modeling",
    "led_model.data",
    "led_model.tokenization",
    "led_model.checkpoint",
    "led_model.generation",
    "led_model.masks",
    "led_model.packing",
    "led_model.config",
    "led_model.checks",
    "led_model.terminal",
    "led_model.schema",
    "led_model.activations",
    "led_model.precision",
    "led_model.overflow",
    "led_kernels.hf",
    "led_kernels.testing",
    "led_kernels.distributed",
    "led_kernels",
    "led_kernels.recompute",
    "led_kernels.loss",
    "led_kernels.projection",
    "led_kernels.distributed.split_keys",
    "led_kernels.distributed.split_attention",
    "led_kernels.distributed.halo",
    "led_kernels.distributed.collectives",
    "led_kernels.distributed.context",
    "led_kernels.distributed.gradients",
    "led_kernels.gemv",
    "led_kernels.attention_weights",
    "led_kernels.absorbed",
    "led_kernels.api",
    "led_kernels.ops",
    "led_kernels.sharding",
    "led_kernels.capture",
    "led_kernels.dispatch",
    "led_kernels.backends",
    "led_kernels._C",
    "led_kernels.call_checks",
    "led_kernels.call",
    "led_kernels.arguments",
    "led_kernels.global_rows",
    "led_kernels.mask",
    "led_kernels.mask_shard",
    "led_kernels.mask_checks",
    "led_kernels.mask_tensors",
    "led_kernels.argument_checks",
    "led_kernels.philox",
    "led_kernels.first_order",
    "led_kernels.eager",
    "led_kernels.parallel_linear",
    "led_kernels.modules",
    "led_kernels.processes",
    "led_kernels.sums",
    "led_kernels.trainer",
    "led_kernels.positions",
    "led_kernels.extras",
)


@pytest.fixture(scope="module")
def found():
    return arrows(ROOT, PACKAGES)


def test_no_circle(found):
    told = ["\n  ".join(map(str, circle)) for circle in circles(found)]
    assert not told, "These imports run in a circle:\n  " + "\n\n  ".join(told)


def test_layers_point_one_way(found):
    told = [str(arrow) for arrow in against_order(found, LAYERS)]
    assert not told, "These arrows run back, from a lower layer to a higher one:\n  " + "\n  ".join(told)


def test_a_backend_imports_no_other(found):
    backends = "led_kernels.backends."

    def name(module: str) -> str:
        return module.removeprefix(backends).partition(".")[0] if module.startswith(backends) else "_"

    told = [
        str(arrow)
        for arrow in found
        if name(arrow.source)[0] != "_"
        and name(arrow.target)[0] != "_"
        and name(arrow.source) != name(arrow.target)
    ]
    assert not told, "These backends import another:\n  " + "\n  ".join(told)


def test_a_circle_is_told(tmp_path):
    """An import inside a function, one for type checkers and a relative one are arrows, too."""
    for name, text in {
        "__init__": "",
        "a": "from package import b",
        "b": "def f():\n    from .c import g",
        "c": "if TYPE_CHECKING:\n    import package.a\n",
        "d": "from package.a import f",
    }.items():
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / f"{name}.py").write_text(text)
    found = arrows(tmp_path, ["package"])
    (circle,) = circles(found)
    assert [str(arrow) for arrow in circle] == [
        "package/a.py:1: package.a imports package.b",
        "package/b.py:2: package.b imports package.c",
        "package/c.py:2: package.c imports package.a",
    ]
    (arrow,) = against_order(found, ["package", "package.d", "package.a", "package.b", "package.c"])
    assert str(arrow) == "package/c.py:2: package.c imports package.a"
