"""Compiles the CUDA kernels with g++ behind the shim, into a module that stands in for ``led_kernels._C``.

Objects and modules are kept by a hash of all that goes into them, so that only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
SHIM = FOLDER / "shim"
CACHE = ROOT / "build" / "host_cuda"
HEAD_DIMS = (32, 64, 128, 256)
KERNELS = ("banded_forward", "banded_backward", "global_forward", "global_backward")
SANITIZE = os.environ.get("LED_KERNELS_SANITIZE", "")

_COMPILER = os.environ.get("CXX", "g++")
_PROCESSES = 2
_RUNTIME = tuple(SHIM / name for name in ("execution.cpp", "fiber.cpp", "host_primitives.cpp"))


class BuildError(RuntimeError):
    """Says what the compiler printed."""


@dataclass(frozen=True)
class Unit:
    """Describes one object: a source, its macros, and how hard to optimize it."""

    source: Path
    macros: tuple[str, ...] = ()
    optimize: str = "-O1"

    def command(self) -> list[str]:
        """Returns the command without the source and the output."""
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", self.optimize]
        flags += _sanitizer_flags()
        includes = [SHIM, pybind11.get_include(), sysconfig.get_path("include")]
        macros = ["LED_HOST_CUDA", "LED_KERNELS_WITH_CUDA", *self.macros]
        return [_COMPILER, *flags, *(f"-I{x}" for x in includes), *(f"-D{x}" for x in macros), "-x", "c++"]

    def key(self) -> str:
        """Hashes the command and every file of this project that the source includes."""
        digest = hashlib.sha256(repr((self.command(), _compiler_version())).encode())
        for file in _with_headers(self.source):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:24]

    def compile(self) -> Path:
        output = CACHE / "objects" / f"{self.key()}.o"
        return _made(output, [*self.command(), "-c", str(self.source)])


def module_units(csrc: Path = ROOT / "csrc", head_dims: Sequence[int] = HEAD_DIMS) -> list[Unit]:
    """Returns everything that the module is linked of."""
    cuda = csrc / "cuda"
    architectures = ("LED_CUDA_ARCHS=75,80,90", "LED_CUDA_PTX=90")
    return [
        *(kernel_unit(name, head_dim, csrc) for head_dim in reversed(head_dims) for name in KERNELS),
        Unit(csrc / "bindings.cpp", optimize="-O0"),
        Unit(cuda / "dispatch.cu", architectures),
        Unit(FOLDER / "no_cpu_kernels.cpp"),
        *(Unit(source, optimize="-O3") for source in _RUNTIME),
    ]


def kernel_unit(name: str, head_dim: int, csrc: Path = ROOT / "csrc") -> Unit:
    return Unit(csrc / "cuda" / f"{name}.cu", (f"LED_HEAD_DIM={head_dim}",))


def build_module(units: Sequence[Unit] | None = None) -> Path:
    """Compiles and links -> the module's file, named as Python wants it."""
    return _link(units or module_units(), "_C" + sysconfig.get_config_var("EXT_SUFFIX"))


def build_toys() -> Path:
    """Builds the library of ``toys.cu``."""
    return _link(
        [Unit(FOLDER / "toys.cu"), *(Unit(source, optimize="-O3") for source in _RUNTIME)], "toys.so"
    )


def _link(units: Sequence[Unit], name: str) -> Path:
    with ThreadPoolExecutor(_PROCESSES) as pool:
        objects = [str(path) for path in pool.map(Unit.compile, units)]
    key = hashlib.sha256(repr((objects, _sanitizer_flags())).encode()).hexdigest()[:24]
    return _made(CACHE / "linked" / key / name, [_COMPILER, "-shared", *_sanitizer_flags(), *objects])


def _made(output: Path, command: list[str]) -> Path:
    """Makes the file that the command writes, unless it is there already."""
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        unfinished = Path(folder, output.name)
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if result.returncode:
            raise BuildError(f"{' '.join(command)}\n{result.stderr}")
        unfinished.replace(output)
    return output


def _sanitizer_flags() -> list[str]:
    if not SANITIZE:
        return []
    return [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]


def _compiler_version() -> str:
    return subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _with_headers(source: Path) -> list[Path]:
    """Returns the source and what it includes of its own tree and of the shim, directly or not."""
    found, queue = {}, [source]
    while queue:
        file = queue.pop()
        found[file.resolve()] = None
        for name in re.findall(r'^\s*#\s*include [<"]([^">]+)[">]', file.read_text(encoding="utf-8"), re.M):
            for folder in (file.parent, SHIM):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    queue.append(header)
    return sorted(found, key=lambda path: (path.name, str(path)))
