"""Which backend serves a call, why another refuses, and what each needs: instruction sets, memory, no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import led_kernels
from led_kernels import (
    BackendUnavailable,
    LongformerMask,
    backends,
    banded_attention,
    dispatch,
    longformer_attention,
)
from led_kernels.backends import _availability, reference
from led_kernels.backends._gpu import check_grid
from led_kernels.call import AttentionCall
from tests.backends import has_extension, needs_extension, reason_against

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_GPU = torch.cuda.is_available()


def python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def attend(**settings) -> torch.Tensor:
    mask = LongformerMask.from_lengths([4], 4)
    return banded_attention(*torch.randn(3, 1, 4, 1, 8), mask, window_size=1, **settings)


@pytest.fixture
def gpu(monkeypatch) -> Callable[[tuple[int, int]], None]:
    """Makes torch report a GPU of a compute capability."""

    def report(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return report


@pytest.fixture
def extension(monkeypatch) -> Callable[..., None]:
    """Puts an extension with CUDA kernels, or without, in place of led_kernels._C."""

    def replace(
        compiled: tuple[int, ...] = (75, 80, 90),
        ptx: int = 90,
        device_type: str = "cuda",
        with_cuda: bool = True,
    ) -> None:
        fake = ModuleType("led_kernels._C")
        if with_cuda:
            fake.cuda_banded_forward = None
            fake.cuda_architectures = lambda: (list(compiled), ptx)
            fake.cuda_device_type = lambda: device_type
        monkeypatch.setitem(sys.modules, "led_kernels._C", fake)
        monkeypatch.setattr(led_kernels, "_C", fake, raising=False)
        for name in ("_extension", "cuda"):  # imported anew, and after the test the old ones again
            monkeypatch.setattr(backends, name, None, raising=False)
            monkeypatch.delitem(sys.modules, f"led_kernels.backends.{name}", raising=False)
        monkeypatch.setattr(_availability, "import_refusal", _availability.import_refusal.__wrapped__)

    yield replace
    for name in ("_extension", "cuda"):
        sys.modules.pop(f"led_kernels.backends.{name}", None)


class TestCanRun:
    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("device", [None, CPU, CUDA, torch.device("meta")])
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_plain_torch_runs_everywhere(self, backend, device, dtype):
        assert dispatch.can_run(backend, device, dtype, raise_error=True)

    @pytest.mark.parametrize("backend", dispatch.BACKENDS)
    def test_dtype(self, backend):
        device = CUDA if backend in ("triton", "cuda") else CPU
        assert not dispatch.can_run(backend, device, torch.int32)
        with pytest.raises(BackendUnavailable, match=f"backend '{backend}' cannot run: "):
            dispatch.can_run(backend, device, torch.int32, raise_error=True)
        if reason_against(backend, device.type) is None:
            with pytest.raises(
                BackendUnavailable, match=r"it computes in float16, .*, not int32; cast the inputs"
            ):
                dispatch.can_run(backend, device, torch.int32, raise_error=True)

    @needs_extension
    def test_cpu_takes_tensors_on_the_cpu(self):
        assert dispatch.can_run("cpu", CPU, torch.float64)
        with pytest.raises(BackendUnavailable, match="it takes tensors on cpu, these are on cuda; move them"):
            dispatch.can_run("cpu", CUDA, raise_error=True)

    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_gpu_backends_refuse_the_cpu(self, backend, extension):
        extension()
        assert not dispatch.can_run(backend, CPU)
        with pytest.raises(BackendUnavailable, match=r"it takes tensors on cuda|Triton cannot be imported"):
            dispatch.can_run(backend, CPU, raise_error=True)

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
    def test_triton_refuses_turing(self, capability, gpu):
        pytest.importorskip("triton")
        gpu(capability)
        if capability >= (8, 0):
            assert dispatch.can_run("triton", CUDA, torch.bfloat16, raise_error=True)
        else:
            with pytest.raises(
                BackendUnavailable, match=r"no tensor cores on this GPU, .*; use backend='cuda'"
            ):
                dispatch.can_run("triton", CUDA, raise_error=True)

    def test_triton_refuses_old_releases(self, monkeypatch):
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        monkeypatch.setattr(_availability, "_missing_triton", _availability._missing_triton.__wrapped__)
        with pytest.raises(
            BackendUnavailable, match=r"Triton is 3\.5\.1, the kernels need 3\.6 or newer; upgrade"
        ):
            dispatch.can_run("triton", CUDA, raise_error=True)

    def test_triton_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(_availability, "_missing_triton", _availability._missing_triton.__wrapped__)
        with pytest.raises(BackendUnavailable, match=r"Triton cannot be imported .*'\.\[triton\]'"):
            dispatch.can_run("triton", CUDA, raise_error=True)

    @pytest.mark.skipif(HAS_GPU, reason="torch sees a GPU")
    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_gpu_backends_need_a_gpu(self, backend, extension):
        extension()
        with pytest.raises(BackendUnavailable, match=r"torch sees no GPU|Triton cannot be imported"):
            dispatch.can_run(backend, CUDA, raise_error=True)

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match="backend is 'metal'; give one of reference, torch, cpu, triton, cuda"
        ):
            dispatch.can_run("metal")


class TestCanRunCuda:
    """Each build on each GPU: machine code runs on later minor capabilities, PTX on all later ones."""

    @pytest.mark.parametrize(
        ("compiled", "ptx", "capability"),
        [
            ((75, 80, 90), 90, (7, 5)),
            ((75, 80, 90), 90, (8, 9)),
            ((75, 80, 90), 90, (12, 0)),
            ((75,), 75, (8, 0)),
        ],
    )
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_serves(self, compiled, ptx, capability, dtype, extension, gpu):
        extension(compiled, ptx)
        gpu(capability)
        if dtype == torch.float64:
            with pytest.raises(
                BackendUnavailable, match="it computes in float16, bfloat16, float32, not float64"
            ):
                dispatch.can_run("cuda", CUDA, dtype, raise_error=True)
        elif dtype == torch.bfloat16 and 75 in (compiled[-1], 10 * capability[0] + capability[1]):
            with pytest.raises(BackendUnavailable, match="runs the code for sm_75, bfloat16 needs sm_80"):
                dispatch.can_run("cuda", CUDA, dtype, raise_error=True)
        else:
            assert dispatch.can_run("cuda", CUDA, dtype, raise_error=True)

    @pytest.mark.parametrize(
        ("compiled", "ptx", "capability", "built"),
        [
            ((86,), 0, (8, 0), "sm_86"),
            ((75, 80, 90), 0, (10, 0), "sm_75, sm_80, sm_90"),
            ((90,), 90, (8, 9), "sm_90, and as PTX of sm_90 for later ones"),
        ],
    )
    def test_other_architectures(self, compiled, ptx, capability, built, extension, gpu):
        extension(compiled, ptx)
        gpu(capability)
        major, minor = capability
        message = (
            rf"this GPU has compute capability {major}\.{minor}, the kernels were built for {built}; "
            rf"run `pip install \.` in a clone of the repository with LED_KERNELS_CUDA_ARCHS={major}\.{minor}, or"
        )
        with pytest.raises(BackendUnavailable, match=message):
            dispatch.can_run("cuda", CUDA, raise_error=True)

    def test_too_old(self, extension, gpu):
        extension()
        gpu((7, 0))
        with pytest.raises(
            BackendUnavailable, match=r"compute capability 7\.0, the kernels need 7\.5 or newer"
        ):
            dispatch.can_run("cuda", CUDA, raise_error=True)

    def test_built_without(self, extension):
        extension(with_cuda=False)
        with pytest.raises(
            BackendUnavailable, match=r"built without the CUDA kernels \(.+\); install CUDA's nvcc"
        ):
            dispatch.can_run("cuda", CUDA, raise_error=True)

    def test_rocm(self, extension, gpu, monkeypatch):
        extension()
        gpu((9, 4))
        monkeypatch.setattr(torch.version, "hip", "6.4")
        with pytest.raises(BackendUnavailable, match="for NVIDIA GPUs and this torch is for ROCm"):
            dispatch.can_run("cuda", CUDA, raise_error=True)

    def test_compiled_for_the_cpu(self, extension, monkeypatch):
        monkeypatch.delenv("LED_KERNELS_BACKEND", raising=False)
        extension((), 0, device_type="cpu")
        assert dispatch.can_run("cuda", CPU, torch.bfloat16, raise_error=True)
        with pytest.raises(BackendUnavailable, match="it takes tensors on cpu, these are on cuda"):
            dispatch.can_run("cuda", CUDA, raise_error=True)
        assert dispatch.choose_backend(CPU, torch.bfloat16) != "cuda"

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
    def test_chosen_where_triton_refuses(self, capability, extension, gpu, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.delenv("LED_KERNELS_BACKEND", raising=False)
        extension()
        gpu(capability)
        expected = "cuda" if capability < (8, 0) else "triton"
        assert dispatch.choose_backend(CUDA, torch.float16) == expected


def test_grid():
    def call_of(batch: int, heads: int) -> AttentionCall:
        q = torch.empty(1, 1, 1, 1).expand(batch, 1, heads, 1)
        return AttentionCall(q, q, q, LongformerMask.from_lengths([1] * batch, 1), (0, 0), 1.0)

    check_grid(call_of(batch=65535, heads=65535))
    with pytest.raises(
        ValueError, match="mask has 65536 sequences, a launch serves at most 65,535; split the batch"
    ):
        check_grid(call_of(batch=65536, heads=1))
    with pytest.raises(
        ValueError, match="q has 65536 heads, a launch serves at most 65,535; split the heads"
    ):
        check_grid(call_of(batch=1, heads=65536))


def test_a_backend_is_a_module_and_a_record(monkeypatch):
    calls = []

    def count(function: Callable) -> Callable:
        return lambda call, *others: (
            calls.append((function.__name__, call.window)),
            function(call, *others),
        )[1]

    module = ModuleType("led_kernels.backends.counting")
    module.forward, module.backward = count(reference.forward), count(reference.backward)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    record = backends.Backend("counting", "counting", ("cpu",), (torch.float32,), lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "BACKENDS", {"counting": record, **dispatch.BACKENDS})
    assert dispatch.choose_backend(CPU, torch.float32) == "counting"
    with pytest.raises(BackendUnavailable, match="it computes in float32, not float64; cast the inputs"):
        dispatch.choose_backend(CPU, torch.float64, "counting")
    mask = LongformerMask.from_lengths([4], 4, global_index=[0])
    q, k, v = torch.randn(3, 1, 4, 1, 8, requires_grad=True)
    longformer_attention(q, k, v, q, k, v, mask, window_size=1, backend="counting").sum().backward()
    assert sorted(calls, key=str) == [
        ("backward", (1, 1)),
        ("backward", None),
        ("forward", (1, 1)),
        ("forward", None),
    ]


class TestChoice:
    @pytest.fixture(autouse=True)
    def no_environment(self, monkeypatch):
        monkeypatch.delenv("LED_KERNELS_BACKEND", raising=False)

    def test_by_device(self, monkeypatch):
        expected = "cpu" if has_extension() else "torch"
        assert dispatch.choose_backend(CPU, torch.float32) == expected
        runs = {"triton", "cuda"}
        monkeypatch.setattr(dispatch, "can_run", lambda name, *args, **options: name in runs)
        assert dispatch.choose_backend(CUDA, torch.float32) == "triton"
        runs = {"cuda"}
        assert dispatch.choose_backend(CUDA, torch.float32) == "cuda"
        runs = set()
        assert dispatch.choose_backend(CUDA, torch.float32) == "torch"
        assert dispatch.choose_backend(CPU, torch.float32) == "torch"

    def test_reference_is_never_chosen(self):
        for device in (CPU, CUDA, torch.device("meta")):
            assert dispatch.choose_backend(device, torch.float64) != "reference"

    def test_environment_names_it(self, monkeypatch):
        monkeypatch.setenv("LED_KERNELS_BACKEND", "reference")
        assert dispatch.choose_backend(CPU, torch.float32) == "reference"
        assert dispatch.choose_backend(CPU, torch.float32, "torch") == "torch", "an argument goes before"

    @pytest.mark.parametrize("backend", ["triton", "cuda"])
    def test_a_named_backend_never_falls_back(self, backend, monkeypatch):
        with pytest.raises(BackendUnavailable, match=f"backend '{backend}' cannot run: "):
            attend(backend=backend)
        monkeypatch.setenv("LED_KERNELS_BACKEND", backend)
        with pytest.raises(BackendUnavailable, match=f"backend '{backend}' cannot run: "):
            attend()

    def test_unknown_name(self, monkeypatch):
        monkeypatch.setenv("LED_KERNELS_BACKEND", "metal")
        with pytest.raises(ValueError, match="backend is 'metal'"):
            attend()


def test_without_the_extension():
    """No compiler, no triton, no transformers: everything works through the torch backend, and `cpu` says why not."""
    code = """
import sys
for name in ("led_kernels._C", "triton", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from led_kernels import BackendUnavailable, LongformerMask, dispatch, longformer_attention
assert dispatch.choose_backend(torch.device("cpu"), torch.float32) == "torch"
x = torch.randn(1, 9, 2, 8, requires_grad=True)
mask = LongformerMask.from_lengths([9], 9, [0])
longformer_attention(x, x, x, x, x, x, mask, window_size=2).sum().backward()
for backend in ("cpu", "cuda"):
    try:
        longformer_attention(x, x, x, x, x, x, mask, window_size=2, backend=backend)
    except BackendUnavailable as error:
        print(error)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    for backend in ("cpu", "cuda"):
        assert f"backend '{backend}' cannot run: the extension led_kernels._C is not there" in result.stdout
    assert "install a C++17 compiler and run `pip install .` in a clone" in result.stdout
    assert result.stderr.count("led_kernels runs on torch's operations, several times slower") == 1
    assert "LED_KERNELS_BACKEND=torch silences this" in result.stderr
    assert not python(code, LED_KERNELS_BACKEND="torch").stderr


def test_a_clone_that_hides_the_installed_package(tmp_path):
    """The first call says so, and a benchmark does not begin."""
    installed = tmp_path / "site" / "led_kernels"
    installed.mkdir(parents=True)
    (installed / "_C.cpython-3.so").touch()
    code = f"""
import sys
sys.modules["led_kernels._C"] = None
sys.path.append({str(installed.parent)!r})
import torch
from led_kernels import LongformerMask, banded_attention
x = torch.randn(1, 9, 2, 8)
banded_attention(x, x, x, LongformerMask.from_lengths([9], 9), window_size=2)
from benchmarks.__main__ import main
assert main(["--smoke"]) == 1
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert (
        f"the installed led_kernels in {installed}, which has compiled kernels, is hidden by" in result.stderr
    )
    assert "stopped, nothing is timed under another's name" in result.stderr


def test_an_installed_package_without_an_extension_is_not_hidden(tmp_path, monkeypatch):
    """The types of the extension lie in every installation."""
    (tmp_path / "led_kernels").mkdir()
    (tmp_path / "led_kernels/_C.pyi").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert dispatch._hidden_installation() is None


def instruction_sets() -> list[str]:
    if not has_extension():
        return []
    from led_kernels import _C

    return _C.cpu_isas()


ISA_CASES = "cpu and (head_dim or window or loops or nan or infinite or drops) and not longformer"


@needs_extension
class TestInstructionSets:
    @pytest.mark.parametrize("isa", instruction_sets()[1:])  # the first is what every other test runs on
    @pytest.mark.parametrize(
        "cases",
        [
            pytest.param(f"{ISA_CASES} and not float64 and not -float16-", id="short"),
            pytest.param("cpu and not longformer", id="all", marks=pytest.mark.slow),
        ],
    )
    def test_attention_suite(self, isa, cases):
        self.run_suite(isa, "tests/kernels/test_attention.py", cases)

    @pytest.mark.parametrize("isa", instruction_sets()[1:])
    def test_decoding_suite(self, isa):
        self.run_suite(isa, "tests/kernels/test_gemv.py", "float32 or float64")

    def run_suite(self, isa, path, cases):
        command = [sys.executable, "-m", "pytest", path, "-q", "-x", "-k", cases]
        environment = os.environ | {"LED_KERNELS_CPU_ISA": isa}
        result = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-3000:]
        assert " passed" in result.stdout

    def test_one_that_is_not_there(self):
        code = """
import torch
from led_kernels import LongformerMask, banded_attention
banded_attention(*torch.randn(3, 1, 4, 1, 8), LongformerMask.from_lengths([4], 4), window_size=1, backend="cpu")
"""
        result = python(code, LED_KERNELS_CPU_ISA="sparc")
        assert result.returncode == 1
        message = "LED_KERNELS_CPU_ISA is 'sparc'; this build on this processor has " + instruction_sets()[0]
        assert message in result.stderr

    def test_generic_is_always_there(self):
        assert "generic" in instruction_sets()


MEMORY_PROBE = """
import sys
import torch
from led_kernels import LongformerMask, longformer_attention

def status(field):  # KiB -> MiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

backend, backward = sys.argv[1], sys.argv[2] == "backward"

def run(seqlen):
    mask = LongformerMask.from_lengths([seqlen], seqlen, [0, seqlen // 2])
    x = torch.randn(1, seqlen, 6, 4, 64, requires_grad=backward)
    before = status("VmRSS")
    out = longformer_attention(*x.unbind(2), mask, window_size=2048, backend=backend)
    if backward:
        out.backward(torch.ones_like(out))
    return status("VmHWM") - before

run(64)
print(run(16384))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("passes", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_length(passes, target):
    """At 16,384 tokens and w = 2048 one tensor takes 16 MiB, the band 1 GiB and the dense scores 4 GiB."""
    if target.device != "cpu":
        pytest.skip("resident memory of the CPU")
    result = python(MEMORY_PROBE, target.backend, passes)
    assert result.returncode == 0, result.stderr
    tensors = {"forward": 12, "backward": 36}[passes]  # inputs, outputs, gradients and copies
    assert float(result.stdout) < 16 * tensors + 64
