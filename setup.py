"""Builds led_kernels._C, the compiled kernels; everything else about the package is in pyproject.toml.

Environment variables:
    LED_KERNELS_REQUIRE_EXT=1       fail when the extension cannot be built, instead of installing without it
    LED_KERNELS_CUDA=0|1            without the CUDA kernels, or fail when they cannot be built; unset: built where
                                    nvcc is found, in CUDA_HOME, CUDA_PATH or PATH
    LED_KERNELS_CUDA_ARCHS=LIST     compute capabilities to build for, default 75;80;90+PTX
    LED_KERNELS_SANITIZE=LIST       instrument with -fsanitize=LIST, for instance address,undefined; without CUDA
    CC, CXX                         C and C++ compiler; nvcc compiles host code with CXX too
    DEBUG=1                         debug symbols and assertions
"""

import hashlib
import os
import re
import shlex
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError, OptionError

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc", "cuda"))
from nvcc import DEFAULT_ARCHITECTURES, Architectures, Nvcc, NvccError, find_nvcc

CUDA = os.environ.get("LED_KERNELS_CUDA", "")
CUDA_ARCHITECTURES = os.environ.get("LED_KERNELS_CUDA_ARCHS") or DEFAULT_ARCHITECTURES
DEBUG = os.environ.get("DEBUG") == "1"
SANITIZE = os.environ.get("LED_KERNELS_SANITIZE", "")

# Only these files may use instructions that not every machine has; the kernels are chosen at run time.
ISA_FLAGS = {
    "unix": {
        "cpu_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "cpu_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    },
    "msvc": {"cpu_avx2": ["/arch:AVX2"], "cpu_avx512": ["/arch:AVX512"]},
}
# On another architecture a compiler may refuse these flags or ignore them: either way the probe fails.
ISA_PROBE = """
#if !defined(__AVX2__) && !defined(__AVX512F__)
#error not x86-64
#endif
"""
OPENMP_PROBE = """
#include <omp.h>
int main() { return omp_get_max_threads() < 1; }
"""
OPENMP_FLAGS = {  # (compile, link), the first that works
    "unix": [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])],
    "msvc": [(["/openmp"], [])],
}


@contextmanager
def output_to(file):
    """Send what this process and the compilers it starts print to `file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, fd in enumerate(saved, start=1):
            os.dup2(fd, target)
            os.close(fd)


def with_headers(path, seen=()):
    """`path` and every header of csrc that it includes, directly or not."""
    files = {path, *seen}
    for name in re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")):
        for header in (path.parent / name, Path("csrc") / name):
            header = Path(os.path.normpath(header))
            if header not in files and header.is_file():
                files |= with_headers(header, files)
    return files


def results(futures: list[Future]) -> list[str]:
    """Theirs, once all are done; after a failure, the others are not begun."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class BuildExt(build_ext):
    """Compiles each file with its own flags, several at a time, and only those that changed.

    If that fails, the reason goes to `_build_error.txt`, where the extension would be, or to
    `_cuda_build_error.txt` if only the CUDA kernels are missing; `led info` shows it.
    """

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # whose temporary folder would make every build one from scratch
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        error_file = output.with_name("_build_error.txt")
        cuda_error_file = output.with_name("_cuda_build_error.txt")
        output.parent.mkdir(parents=True, exist_ok=True)
        for stale in (output, error_file, cuda_error_file):
            stale.unlink(missing_ok=True)
        failure = no_cuda = None
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            try:
                with output_to(log):
                    no_cuda = self.compile_and_link(ext, output)
            except (CCompilerError, BaseError) as exc:
                failure = exc
            log.seek(0)
            printed = log.read()
        print(printed, end="")
        if failure is None:
            if no_cuda:
                cuda_error_file.write_text(f"{no_cuda}\n", encoding="utf-8")
                self.warn(f"led-kernels is installed without its CUDA kernels: {no_cuda}")
            return
        compiler_error = re.search(r".*\berror( [A-Z]+\d+)?:.*", printed)
        is_nvcc = isinstance(failure, NvccError)
        reason = compiler_error[0] if compiler_error and not is_nvcc else str(failure)
        error_file.write_text(reason + "\n", encoding="utf-8")
        if not ext.optional or CUDA == "1" or isinstance(failure, OptionError):
            ext.optional = False  # setuptools would go on without it
            raise failure
        self.warn(
            f"led-kernels is installed without its compiled kernels, as building them failed: {reason}\n"
            "  It works through the slower `torch` backend. Building needs a C++17 compiler and "
            "Python's headers; LED_KERNELS_REQUIRE_EXT=1 makes a failure an error."
        )

    def compile_and_link(self, ext, output):
        """Builds the extension; why it holds no CUDA kernels, or None if it does."""
        nvcc, no_cuda = self.find_cuda()
        compile_flags, link_flags = self.common_flags()
        file_flags = self.file_flags()

        def compile_source(source, *definitions):
            flags = [*compile_flags, *file_flags.get(Path(source).stem, []), *definitions]
            folder = self.object_folder(getattr(self.compiler, "compiler_so_cxx", None), flags)
            (obj,) = self.compiler.object_filenames([source], strip_dir=False, output_dir=folder)
            if self.is_stale(obj, source):
                self.compiler.compile(
                    [source], output_dir=folder, include_dirs=ext.include_dirs, extra_postargs=flags
                )
            return obj

        def compile_bindings(with_cuda):
            return compile_source("csrc/bindings.cpp", *(["-DLED_KERNELS_WITH_CUDA"] if with_cuda else []))

        # A linker keeps the first of several copies of an inline function. Portable objects come first, so
        # that no copy which runs on every machine is one compiled for only some.
        sources = sorted(ext.sources, key=lambda source: (Path(source).stem in ISA_FLAGS["unix"], source))
        sources.remove("csrc/bindings.cpp")
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            cuda = [pool.submit(self.compile_cuda, nvcc, *args) for args in nvcc.objects()] if nvcc else []
            bindings = pool.submit(compile_bindings, with_cuda=nvcc is not None)
            objects = [pool.submit(compile_source, source) for source in sources]
            try:
                cuda_objects = results(cuda)
                library_dirs = nvcc.library_dirs() if nvcc else []
            except NvccError as error:
                if CUDA == "1":
                    pool.shutdown(cancel_futures=True)
                    raise
                nvcc, no_cuda, cuda_objects, library_dirs = None, error, [], []
                bindings = pool.submit(compile_bindings, with_cuda=False)
            objects = results([bindings, *objects]) + cuda_objects
        self.compiler.link_shared_object(
            objects,
            str(output),
            libraries=self.get_libraries(ext) + (nvcc.libraries() if nvcc else []),
            library_dirs=ext.library_dirs + library_dirs,
            export_symbols=self.get_export_symbols(ext),
            extra_postargs=link_flags,
            build_temp=self.build_temp,
            target_lang="c++",
        )
        return no_cuda

    def find_cuda(self):
        """nvcc, or None and why the CUDA kernels are not built."""
        if CUDA not in ("", "0", "1"):
            raise OptionError(f"LED_KERNELS_CUDA is {CUDA!r}; give 0 or 1, or unset it.")
        if CUDA == "0":
            return None, "LED_KERNELS_CUDA was 0"
        architectures = Architectures.parse(CUDA_ARCHITECTURES)
        try:
            if SANITIZE:
                raise NvccError("LED_KERNELS_SANITIZE instruments the CPU kernels alone")
            path = find_nvcc()
        except NvccError as error:
            if CUDA == "1":
                raise
            return None, error
        msvc = self.compiler_family() == "msvc"
        return Nvcc(path, architectures, self.host_compiler(), msvc, debug=DEBUG), None

    def host_compiler(self):
        """What nvcc compiles host code with: the compiler of everything else, if one is named."""
        if self.compiler_family() == "msvc":
            self.compiler.initialize()
            return os.path.dirname(self.compiler.cc)
        # without a launcher such as ccache, and without flags
        words = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")]
        return words[-1] if words else None

    def compile_cuda(self, nvcc, source, name, definitions):
        folder = self.object_folder(nvcc.version, nvcc.command, definitions)
        obj = Path(folder, name + self.compiler.obj_extension)
        if self.is_stale(obj, source):
            obj.parent.mkdir(parents=True, exist_ok=True)
            nvcc.compile(source, definitions, obj)
        return str(obj)

    def object_folder(self, *command):
        """Objects of different commands live in different folders, so that a change of flags recompiles."""
        return os.path.join(self.build_temp, hashlib.sha256(repr(command).encode()).hexdigest()[:8])

    def is_stale(self, obj, source):
        """Whether an object is missing or older than its source or a header of that."""
        newest_input = max(file.stat().st_mtime for file in with_headers(Path(source)))
        return self.force or not os.path.exists(obj) or os.path.getmtime(obj) < newest_input

    def common_flags(self):
        """Flags for compiling any source, and for linking."""
        if self.compiler.compiler_type == "msvc":
            compile_flags = ["/std:c++17", "/EHsc", "/bigobj", "/O2"]
            link_flags = []
            if DEBUG:
                compile_flags += ["/Z7", "/UNDEBUG"]
                link_flags += ["/DEBUG"]
        else:
            # psabi: wide vectors are passed between functions, but never between files.
            optional = ["-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"]
            compile_flags = ["-std=c++17", "-O3", *(flag for flag in optional if self.compiles([flag]))]
            link_flags = []
            # Python's own flags, which come first, may hold -g and NDEBUG.
            compile_flags += ["-g", "-UNDEBUG"] if DEBUG or SANITIZE else ["-g0"]
            if SANITIZE:
                sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
                compile_flags += ["-O1", *sanitize]
                link_flags += sanitize
        for openmp_compile, openmp_link in OPENMP_FLAGS[self.compiler_family()]:
            if self.compiles(openmp_compile, OPENMP_PROBE, openmp_link):
                return compile_flags + openmp_compile, link_flags + openmp_link
        return compile_flags, link_flags

    def file_flags(self):
        """Extra flags by the stem of the file's name; a file without its instruction set compiles to nothing."""
        candidates = ISA_FLAGS[self.compiler_family()]
        flags = {stem: isa for stem, isa in candidates.items() if self.compiles(isa, ISA_PROBE)}
        if self.compiler_family() == "unix":
            flags["cpu_avx512_emulated"] = ["-O1"]  # for tests alone, and at -O3 a third of the build's time
        return flags

    def compiler_family(self):
        return "msvc" if self.compiler.compiler_type == "msvc" else "unix"

    def compiles(self, flags, code="", link_flags=None):
        """Whether `code` compiles and, if `link_flags` are given, links to a program."""
        with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w") as log:
            source = Path(folder, "probe.cpp")
            source.write_text(code, encoding="utf-8")
            try:
                with output_to(log):
                    objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                    if link_flags is not None:
                        self.compiler.link_executable(
                            objects, "probe", output_dir=folder, extra_postargs=link_flags, target_lang="c++"
                        )
            except (CompileError, LinkError):
                return False
        return True

    def copy_extensions_to_source(self):
        """For an editable install: the extension, or why there is none, beside the Python sources."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("led_kernels"))
        built = Path(self.build_lib, "led_kernels")
        extension = Path(self.get_ext_fullpath("led_kernels._C")).name
        for name in ("_build_error.txt", "_cuda_build_error.txt", extension):
            target = package / name
            if (built / name).exists():
                self.copy_file(str(built / name), str(target))
            else:
                target.unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension(
            "led_kernels._C",
            sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            # puts them into the sdist
            depends=sorted(
                str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".py")
            ),
            include_dirs=["csrc", pybind11.get_include()],
            optional=os.environ.get("LED_KERNELS_REQUIRE_EXT") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
