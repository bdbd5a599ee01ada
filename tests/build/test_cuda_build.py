"""How setup.py builds the CUDA part, on a toy of csrc: with nvcc, without, and with one that fails.

The real kernels take minutes; ``.ci/run`` builds them into a wheel, and the last test looks at the extension in use.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
TOY = {
    "README.md": "",
    "LICENSE": "",
    "led_kernels/__init__.py": "__version__ = '0'",
    "csrc/bindings.cpp": """
#include <Python.h>

#include <string>

#if defined(LED_KERNELS_WITH_CUDA)
std::string built_for();
#else
std::string built_for() { return "nothing"; }
#endif

static PyObject* describe(PyObject*, PyObject*) { return PyUnicode_FromString(built_for().c_str()); }
static PyMethodDef methods[] = {{"built_for", describe, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
""",
    "csrc/cuda/fill.h": "template <int kHeadDim>\nint fill();\n",
    "csrc/cuda/scale.cuh": "constexpr int kScale = 1;\n",
    "csrc/cuda/fill.cu": """
#include "fill.h"
#include "scale.cuh"

static __global__ void kernel(int* x) { *x = LED_HEAD_DIM; }

template <>
int fill<LED_HEAD_DIM>() {
  int* x = nullptr;
  kernel<<<1, 1>>>(x);
  return kScale * LED_HEAD_DIM;
}
""",
    "csrc/cuda/dispatch.cu": """
#include <string>

#include "fill.h"

std::string built_for() {
  std::string text;
  for (int architecture : {LED_CUDA_ARCHS}) text += "sm_" + std::to_string(architecture) + " ";
  const int sum = fill<32>() + fill<64>() + fill<128>() + fill<256>();
  return text + "compute_" + std::to_string(LED_CUDA_PTX) + " " + std::to_string(sum);
}
""",
}
FAILING_NVCC = """#!/bin/sh
case "$1" in --version) echo release 0.0 ;; *) echo 'fill.cu(7): error: expected a ";"' >&2; exit 2 ;; esac
"""


def nvcc_module():
    """What setup.py imports."""
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc/cuda/nvcc.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nvcc"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


class TestArchitectures:
    @pytest.mark.parametrize(
        ("text", "compiled", "ptx"),
        [
            ("75;80;90+PTX", (75, 80, 90), 90),
            ("7.5;8.0;9.0+PTX", (75, 80, 90), 90),
            ("9.0,8.6 80", (80, 86, 90), 0),
            ("12.0", (120,), 0),
            ("80+PTX;100", (80, 100), 80),
        ],
    )
    def test_read(self, text, compiled, ptx):
        read = nvcc_module().Architectures.parse(text)
        assert (read.compiled, read.ptx) == (compiled, ptx)

    @pytest.mark.parametrize("text", ["Ampere", "7.0", "90a", "sm_80", "8.0+ptx", "80+PTX;90+PTX", "-80"])
    def test_refused(self, text):
        module = nvcc_module()
        with pytest.raises(module.OptionError, match=r"LED_KERNELS_CUDA_ARCHS is '.*'; give "):
            module.Architectures.parse(text)

    def test_flags(self):
        flags = nvcc_module().Architectures.parse("75;90+PTX").flags()
        assert flags == [
            "-gencode=arch=compute_75,code=sm_75",
            "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]


@pytest.fixture
def toy(tmp_path):
    for name, text in TOY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("setup.py", "pyproject.toml", "csrc/cuda/nvcc.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def path_with(folder: Path | None = None) -> str:
    """PATH without nvcc, and before it ``folder``."""
    folders = os.environ["PATH"].split(os.pathsep)
    without = [name for name in folders if shutil.which("nvcc", path=name) is None]
    return os.pathsep.join([str(folder)] * (folder is not None) + without)


@pytest.fixture
def failing_nvcc(tmp_path):
    program = tmp_path / "bin/nvcc"
    program.parent.mkdir()
    program.write_text(FAILING_NVCC, encoding="utf-8")
    program.chmod(0o755)
    return program.parent


def build(toy: Path, **settings: str) -> subprocess.CompletedProcess:
    hidden = ("CUDA_HOME", "CUDA_PATH", "LED_KERNELS_SANITIZE", "LED_KERNELS_CUDA_ARCHS", "LED_KERNELS_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | settings
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=toy, env=environment, capture_output=True, text=True)


def built_for(toy: Path) -> str:
    """Which the toy says when it is imported in a fresh interpreter."""
    code = "from led_kernels import _C; print(_C.built_for())"
    done = subprocess.run([sys.executable, "-c", code], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dynamic_libraries(extension: Path | str) -> str:
    """What an ELF file asks its loader for."""
    done = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True)
    assert "libc.so" in done.stdout
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="the nvcc that fails is a shell script")
class TestWithoutCuda:
    """The rest is built, and the reason is kept where `led info` finds it."""

    def check(self, toy, done, reason):
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"installed without its CUDA kernels: {reason}" in done.stdout + done.stderr
        assert reason in (toy / "led_kernels/_cuda_build_error.txt").read_text()
        assert built_for(toy) == "nothing"

    def test_no_nvcc(self, toy):
        self.check(toy, build(toy, PATH=path_with()), "nvcc is neither in CUDA_HOME or CUDA_PATH nor on PATH")

    def test_forbidden(self, toy, failing_nvcc):
        done = build(toy, PATH=path_with(failing_nvcc), LED_KERNELS_CUDA="0")
        self.check(toy, done, "LED_KERNELS_CUDA was 0")

    def test_sanitized(self, toy, failing_nvcc):
        done = build(toy, PATH=path_with(failing_nvcc), LED_KERNELS_SANITIZE="undefined")
        self.check(toy, done, "LED_KERNELS_SANITIZE instruments the CPU kernels alone")

    def test_nvcc_fails(self, toy, failing_nvcc):
        done = build(toy, PATH=path_with(failing_nvcc))
        self.check(toy, done, 'fill.cu(7): error: expected a ";"')

    @pytest.mark.parametrize("nvcc", ["missing", "failing"])
    def test_demanded(self, nvcc, toy, failing_nvcc):
        path = path_with(failing_nvcc) if nvcc == "failing" else path_with()
        done = build(toy, PATH=path, LED_KERNELS_CUDA="1", LED_KERNELS_REQUIRE_EXT="0")
        assert done.returncode != 0
        reason = "fill.cu(7): error" if nvcc == "failing" else "nvcc is neither in CUDA_HOME"
        assert reason in done.stderr
        assert not list(toy.glob("led_kernels/_C*"))

    @pytest.mark.parametrize("settings", [{"LED_KERNELS_CUDA": "yes"}, {"LED_KERNELS_CUDA_ARCHS": "Ampere"}])
    def test_wrong_settings(self, settings, toy):
        done = build(toy, **settings)
        assert done.returncode != 0
        (name,) = settings
        assert f"{name} is {settings[name]!r}; give " in done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
class TestWithCuda:
    def objects(self, toy) -> dict[str, int]:
        """When each object was written."""
        return {path.stem: path.stat().st_mtime_ns for path in toy.glob("build/temp*/*/*.o")}

    def test_builds_what_changed(self, toy):
        settings = {"LED_KERNELS_CUDA": "1", "LED_KERNELS_CUDA_ARCHS": "7.5,80+PTX"}
        done = build(toy, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert built_for(toy) == "sm_75 sm_80 compute_80 480"
        assert not (toy / "led_kernels/_cuda_build_error.txt").exists()
        first = self.objects(toy)
        assert {"dispatch", "fill_32", "fill_64", "fill_128", "fill_256"} <= set(first)
        logs = [path.read_text() for path in toy.glob("build/temp*/*/fill_*.log")]
        assert len(logs) == 4
        assert all("spill" in log and "sm_75" in log and "sm_80" in log for log in logs)
        if sys.platform == "linux":
            (extension,) = toy.glob("led_kernels/_C*.so")
            assert "cuda" not in dynamic_libraries(extension)

        (toy / "csrc/cuda/scale.cuh").write_text("constexpr int kScale = 2;\n")
        assert build(toy, **settings).returncode == 0
        assert built_for(toy) == "sm_75 sm_80 compute_80 960"
        second = self.objects(toy)
        assert {name for name in first if second[name] != first[name]} == {
            "fill_32",
            "fill_64",
            "fill_128",
            "fill_256",
        }


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_extension_needs_no_library_of_cuda():
    extension = pytest.importorskip("led_kernels._C")
    if not hasattr(extension, "cuda_banded_forward"):
        pytest.skip("built without CUDA")
    assert "cuda" not in dynamic_libraries(extension.__file__)
