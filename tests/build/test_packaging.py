"""What the package is: its layers, imports, source distribution, and the machine code of its extension."""

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import led_kernels

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("led_kernels", "led_model") for path in ROOT.glob(f"{package}/**/*.py"))

BLOCKED_IMPORTS = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    blocked = {"led_kernels._C", "triton", "transformers", "tokenizers", "huggingface_hub", "psutil"}

    def find_spec(self, name, path=None, target=None):
        if name in self.blocked or name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""
USE_WITHOUT_EXTENSION = """
import torch
import led_kernels, led_model
from led_kernels import LongformerMask, banded_attention

mask = LongformerMask.from_padding(torch.ones(1, 50, dtype=torch.long))
q, k, v = torch.randn(3, 1, 50, 2, 8)
out = banded_attention(q, k, v, mask, window_size=4)
torch.testing.assert_close(out, banded_attention(q, k, v, mask, window_size=4, backend="reference"))
print(led_kernels.__file__)
"""


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, anywhere=True):
    """Absolute names of what a file imports; without `anywhere`, only of what importing the file imports."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    pending, names = [ast.parse(path.read_text(encoding="utf-8"))], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif anywhere or not (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            pending.extend(ast.iter_child_nodes(node))
    return names


def within(name, package):
    return name == package or name.startswith(package + ".")


def requirements(extra=None):
    """Import names of the run-time dependencies, or of those that an extra adds."""
    wanted = f'extra == "{extra}"' if extra else "extra =="
    lines = importlib.metadata.requires("led-kernels")
    return {
        re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines if (wanted in line) == bool(extra)
    }


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_works_with_nothing_optional():
    run(sys.executable, "-c", BLOCKED_IMPORTS + USE_WITHOUT_EXTENSION, cwd=ROOT)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_layers(path):
    module, names = module_name(path), imported(path)
    if within(module, "led_kernels"):
        assert not [name for name in names if within(name, "led_model")]
    may_use_transformers = within(module, "led_kernels.hf") or within(module, "led_model.training")
    if any(within(name, "transformers") for name in names) and not may_use_transformers:
        assert module == "led_model.cli.demo", (
            "only led_kernels.hf, led finetune, and led demo for its comparison, use transformers"
        )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_are_declared(path):
    module = module_name(path)
    own = {"led_kernels", "led_model", *sys.stdlib_module_names}
    at_import = {name.partition(".")[0] for name in imported(path, anywhere=False)} - own - requirements()
    if within(module, "led_kernels.hf"):
        at_import -= requirements("hf")
    if within(module, "led_kernels.backends.triton"):
        at_import -= requirements("triton")
    if within(module, "led_model.training"):
        at_import -= requirements("train") | requirements("hf")
    assert not at_import
    lazily = {name.partition(".")[0] for name in imported(path)} - own - requirements()
    assert lazily <= set().union(*map(requirements, ("hf", "text", "quant", "demo", "triton", "train")))


def test_version_and_console_script():
    assert importlib.metadata.version("led-kernels") == led_kernels.__version__
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="led")
    assert callable(script.load())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder)
    return next(path for path in folder.iterdir() if path.is_dir())


def test_sdist_holds_all_of_csrc(sdist):
    def files(root):
        paths = (path for path in root.glob("csrc/**/*") if path.is_file() and path.suffix != ".pyc")
        return {path.relative_to(root) for path in paths}

    assert files(sdist) == files(ROOT)
    assert (sdist / "LICENSE").is_file()


def test_wheel_without_a_compiler(sdist, tmp_path):
    """It installs, says why the extension is missing, and works through the `torch` backend."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, sdist]
    env = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler", "LED_KERNELS_CUDA": ""}
    refused = subprocess.run(
        build, env={**env, "LED_KERNELS_REQUIRE_EXT": "1"}, capture_output=True, text=True
    )
    assert refused.returncode != 0

    printed = run(*build, env={**env, "LED_KERNELS_REQUIRE_EXT": "0"})
    assert "installed without its compiled kernels" in printed
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    top_level = {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"}
    assert top_level == {"led_kernels", "led_model"}
    assert "no-such-compiler" in (tmp_path / "site/led_kernels/_build_error.txt").read_text()
    for name in ("led_kernels/py.typed", "led_kernels/_C.pyi", "led_model/py.typed"):
        assert (tmp_path / "site" / name).is_file(), "without it, type checkers ignore the annotations"
    # -S: without the import hook of an editable install, which would find the checkout's extension.
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{Path(torch.__file__).parent.parent}"}
    assert str(tmp_path) in run(sys.executable, "-S", "-c", USE_WITHOUT_EXTENSION, cwd=tmp_path, env=env)


def test_stub_names_what_the_extension_binds():
    """Besides that it names the functions of builds with CUDA."""
    extension = pytest.importorskip("led_kernels._C")
    stub = ast.parse((ROOT / "led_kernels/_C.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}

    def members(node):
        own = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        own |= {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}
        return own.union(*(members(classes[base.id]) for base in node.bases if base.id in classes))

    def public(names):
        return {name for name in names if not name.startswith(("_", "cuda_"))}

    assert public({*classes, *functions}) == public(vars(extension))
    for name in public(classes):
        bound = vars(getattr(extension, name)).keys() - {"name", "value"}  # of every enumeration of pybind11
        assert public(members(classes[name])) == public(bound), name


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_avx_stays_in_its_namespaces():
    """What runs on any processor, or before its instruction set is known, holds no AVX instructions."""
    extension = pytest.importorskip("led_kernels._C")
    listing = run("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", extension.__file__)
    users, function = set(), None
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif re.match(r"\s+[0-9a-f]+:\tv\w+ ", line):  # only the names of AVX instructions start with v
            users.add(function)
    isa = re.compile(r"led::avx(2|512)::")
    assert any(isa.search(name) for name in users)
    assert not [name for name in users if not isa.search(name)]


def test_importing_takes_no_more_than_torch():
    """torch's compiler, which takes as long to import as torch itself, comes when something is compiled."""
    code = (
        "import sys, torch, led_kernels, led_model.cli.parser\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'transformers', 'tokenizers')\n"
        "sys.exit(' '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


def test_no_name_is_advised_that_no_index_serves():
    """A stranger could claim it."""
    for path in [*SOURCES, ROOT / "setup.py", ROOT / "README.md", *ROOT.glob("benchmarks/**/*.py")]:
        text = path.read_text("utf-8")
        assert not re.search(r"led-kernels\[|install '?led[-_]kernels", text), path
