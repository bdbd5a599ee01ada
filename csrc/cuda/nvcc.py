"""nvcc as setup.py uses it: finds it, reads the architectures, compiles csrc/cuda, says what to link.

Built with CUDA 13.0. CUDA 12 and Windows are meant to work and untested.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from setuptools.errors import CompileError, OptionError

DEFAULT_ARCHITECTURES = "75;80;90+PTX"
HEAD_DIMS = (256, 128, 64, 32)  # each an object of its own; the slowest to compile come first
OLDEST_ARCHITECTURE = 75  # the first with the products of matrices that the kernels use


class NvccError(CompileError):
    """There is no nvcc, or it failed; the message is one line."""


@dataclass(frozen=True)
class Architectures:
    """Compute capabilities: ``compiled`` as machine code, ``ptx`` (0: none) as code for later devices' drivers."""

    compiled: tuple[int, ...]
    ptx: int

    @classmethod
    def parse(cls, text: str) -> Architectures:
        """From ``7.5;8.0+PTX`` or ``75,80+PTX``, as in torch's TORCH_CUDA_ARCH_LIST.

        Raises:
            OptionError: for anything else.
        """
        compiled, ptx = set(), set()
        for item in re.split(r"[;,\s]+", text.strip()):
            match = re.fullmatch(r"(\d{1,2})\.?(\d)(\+PTX)?", item)
            number = int(match[1] + match[2]) if match else 0
            if number < OLDEST_ARCHITECTURE:
                raise OptionError(
                    f"LED_KERNELS_CUDA_ARCHS is {text!r}; give compute capabilities from 7.5 on, the last with +PTX "
                    f"if later devices shall be served, as in {DEFAULT_ARCHITECTURES!r}."
                )
            compiled.add(number)
            if match[3]:
                ptx.add(number)
        if len(ptx) > 1:
            raise OptionError(f"LED_KERNELS_CUDA_ARCHS is {text!r}; give +PTX to at most one of them.")
        return cls(tuple(sorted(compiled)), *(ptx or {0}))

    def flags(self) -> list[str]:
        """What nvcc makes of a file."""
        codes = {a: f"[sm_{a},compute_{a}]" if a == self.ptx else f"sm_{a}" for a in self.compiled}
        return [f"-gencode=arch=compute_{a},code={code}" for a, code in codes.items()]

    def definitions(self) -> list[str]:
        """The same for csrc/cuda/dispatch.cu."""
        compiled = r"\,".join(map(str, self.compiled))  # a bare comma would begin nvcc's next definition
        return [f"-DLED_CUDA_ARCHS={compiled}", f"-DLED_CUDA_PTX={self.ptx}"]


def find_nvcc() -> str:
    """Path of nvcc: of CUDA_HOME, of CUDA_PATH, else of PATH.

    Raises:
        NvccError: there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes] + [shutil.which("nvcc")]
    if path := next(filter(None, found), None):
        return path
    raise NvccError("nvcc is neither in CUDA_HOME or CUDA_PATH nor on PATH")


@dataclass(frozen=True)
class Nvcc:
    """One nvcc with one set of flags.

    Attributes:
        path: of nvcc.
        architectures: to compile for.
        host_compiler: what nvcc compiles host code with, a program or its folder; None for nvcc's own choice.
        msvc: whether that is Microsoft's.
        debug: device line numbers, and assertions.
    """

    path: str
    architectures: Architectures
    host_compiler: str | None
    msvc: bool
    debug: bool

    @cached_property
    def command(self) -> list[str]:
        """All but the file's own arguments."""
        host_flags = ["/MD", "/EHsc", "/O2"] if self.msvc else ["-fPIC", "-fvisibility=hidden"]
        return [
            self.path,
            # Without --use_fast_math: fp32 stays exact, and the kernels name the approximate exponential themselves.
            *("-O3", "-std=c++17", "-Icsrc"),
            *self.architectures.flags(),
            *(f"-Xcompiler={flag}" for flag in host_flags),
            *(["-ccbin", self.host_compiler] if self.host_compiler else []),
            # A quarter of the size. Drivers that CUDA 12 code may meet do not all know that compression.
            *(["--compress-mode=size"] if self.release >= 13 else []),
            *(["-lineinfo"] if self.debug else ["-DNDEBUG"]),
            "-Xptxas=-v",
        ]

    @cached_property
    def version(self) -> str:
        return self._run([self.path, "--version"])

    @property
    def release(self) -> int:
        """12, 13, ...; 0 where nvcc does not say."""
        found = re.search(r"release (\d+)", self.version)
        return int(found[1]) if found else 0

    def objects(self) -> Iterator[tuple[Path, str, list[str]]]:
        """Of each object: its source, its name, and its definitions."""
        yield Path("csrc/cuda/dispatch.cu"), "dispatch", self.architectures.definitions()
        kernels = [path for path in sorted(Path("csrc/cuda").glob("*.cu")) if path.stem != "dispatch"]
        for head_dim in HEAD_DIMS:
            for path in kernels:
                yield path, f"{path.stem}_{head_dim}", [f"-DLED_HEAD_DIM={head_dim}"]

    def compile(self, source: Path, definitions: list[str], output: Path) -> None:
        """Compiles one object; what nvcc prints, registers and spills among it, goes to ``output``.log.

        Raises:
            NvccError: with nvcc's first error.
        """
        printed = self._run([*self.command, *definitions, "-c", str(source), "-o", str(output)])
        output.with_name(output.name + ".log").write_text(printed, encoding="utf-8")

    def library_dirs(self) -> list[str]:
        """Where the toolkit's libraries are, as nvcc itself would tell a linker.

        Raises:
            NvccError: the static CUDA runtime is not there.
        """
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.touch()
            printed = self._run([*self.command, "--dryrun", "-c", str(source)])
        found = re.search(r"^#\$ LIBRARIES=(.*)$", printed, re.MULTILINE)
        folders = re.findall(r'"(?:-L|/LIBPATH:)([^"]+)"', found[1]) if found else []
        name = "cudart_static.lib" if self.msvc else "libcudart_static.a"
        if not any(Path(folder, name).exists() for folder in folders):
            raise NvccError(f"{name} is not in the toolkit's folders: {', '.join(folders)}")
        return folders

    def libraries(self) -> list[str]:
        """The CUDA runtime, static: it looks for the driver when it is first called, so that importing needs none."""
        return ["cudart_static"] if self.msvc else ["cudart_static", "dl", "rt", "pthread"]

    @staticmethod
    def _run(command: list[str]) -> str:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
        except OSError as error:
            raise NvccError(f"nvcc cannot be run: {error}") from error
        if done.returncode != 0:
            print(shlex.join(command), done.stdout, sep="\n")
            reason = re.search(r".*\b(?:error|fatal)\b.*", done.stdout)
            raise NvccError(reason[0].strip() if reason else f"nvcc failed with status {done.returncode}")
        return done.stdout
