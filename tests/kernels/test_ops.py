"""The ops as torch operations: schemas, gradients, compilation, autocast, checkpointing, threads, and bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from led_kernels import (
    LongformerMask,
    absorbed_global_attention,
    banded_attention,
    global_attention,
    longformer_attention,
    ops,
)
from led_kernels.global_rows import gather_global_rows
from led_kernels.testing import AttentionCase, attention_function

OPS = ("banded", "global", "longformer")
CASE = AttentionCase(seqlen=21, heads=2, head_dim=5, window_size=(3, 4), globals_per_row=((0, 9), (20,)))
CASES = {
    "padded": replace(CASE, padding="holes"),
    "packed": replace(CASE, packed=True),
    "dropout": replace(CASE, padding="right", dropout_p=0.3),
    "no-globals": replace(CASE, globals_per_row=()),
}


def leaves(case: AttentionCase, mask: LongformerMask, op: str, dtype: torch.dtype) -> list[Tensor]:
    """Inputs without NaN, each a leaf."""
    seeds = range(2 if op == "longformer" else 1)
    triples = (case.inputs(mask, dtype, seed, poison_padding=False) for seed in seeds)
    return [x.detach().clone().requires_grad_() for triple in triples for x in triple]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
class TestRegistration:
    def forward_args(self, op: str, case: AttentionCase, target) -> tuple:
        mask = case.mask(target.device)
        q, k, v = leaves(case, mask, op, torch.float32)
        if op == "global":
            q = gather_global_rows(q, mask).detach().requires_grad_()
        seed = torch.tensor([7], device=target.device) if case.dropout_p else None
        window = (3, 4) if op == "banded" else ()
        scale = 1 / math.sqrt(case.head_dim)
        shared = (*mask.tensors(), seed, mask.max_seqlen, *window, scale, case.dropout_p, target.backend)
        return (q, k, v, *shared)

    @pytest.mark.parametrize("op", OPS[:2])
    def test_opcheck_forward(self, op, case, target):
        function = getattr(ops, f"{op}_forward")
        torch.library.opcheck(function, self.forward_args(op, case, target))

    @pytest.mark.parametrize("op", OPS[:2])
    @pytest.mark.parametrize("with_lse", [True, False])
    def test_opcheck_backward(self, op, with_lse, case, target):
        q, k, v, *shared = (
            x.detach() if isinstance(x, Tensor) else x for x in self.forward_args(op, case, target)
        )
        out, lse = getattr(ops, f"{op}_forward")(q, k, v, *shared)
        d_lse = torch.zeros_like(lse) if with_lse else None
        args = (torch.ones_like(out), d_lse, q, k, v, out, lse, *shared)
        torch.library.opcheck(getattr(ops, f"{op}_backward"), args)

    @pytest.mark.parametrize("op", OPS)
    def test_gradcheck(self, op, case, target):
        """Against numerical derivatives of out and of the finite lse, in fp64."""
        target.require(torch.float64)
        case = replace(case, seqlen=9, globals_per_row=((0, 4), (8,)) if case.globals_per_row else ())
        mask = case.mask(target.device)
        function = attention_function(op, case, mask, target.backend)

        def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
            torch.manual_seed(5)  # the same elements are dropped each time
            out, lse = function(*inputs)
            return (out,) if lse is None else (out, lse.masked_fill(lse.isinf(), 0))

        assert torch.autograd.gradcheck(outputs, leaves(case, mask, op, torch.float64), fast_mode=True)

    @pytest.mark.parametrize("op", OPS)
    def test_compiles_without_a_graph_break(self, op, case, target):
        mask = case.mask(target.device)
        function = attention_function(op, case, mask, target.backend)

        def loss(*inputs: Tensor) -> Tensor:
            out, lse = function(*inputs)
            return out.square().sum() + (0 if lse is None else lse.masked_fill(lse.isinf(), 0).sum())

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = []
        for run in (loss, compiled):
            inputs = leaves(case, mask, op, torch.float32)
            torch.manual_seed(0)
            value = run(*inputs)
            grads = torch.autograd.grad(value, inputs, allow_unused=True)
            results.append([value, *(torch.zeros(()) if grad is None else grad for grad in grads)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiles_with_inductor(op, target):
    case = CASES["padded"]
    mask = case.mask(target.device)
    function = attention_function(op, case, mask, target.backend)
    inputs = leaves(case, mask, op, torch.float32)
    compiled = torch.compile(lambda *x: function(*x)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs)[0] * 2)


def test_dynamic_shapes_compile_once(target):
    """Another length reuses the graph when shapes are dynamic."""

    def attend(attention_mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = LongformerMask.from_padding(attention_mask, max_globals=1)
        return longformer_attention(q, k, v, q, k, v, mask, window_size=3, backend=target.backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seqlen in (12, 19, 40):
            attention_mask = torch.ones(2, seqlen, dtype=torch.int64, device=target.device)
            attention_mask[0, 5] = 2
            qkv = torch.randn(3, 2, seqlen, 2, 8, device=target.device)
            torch.testing.assert_close(compiled(attention_mask, *qkv), attend(attention_mask, *qkv))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op, dtype, target):
    """As if the inputs were cast by hand, and nothing else is rounded; fp64 stays fp64."""
    case, mask = CASES["padded"], CASES["padded"].mask(target.device)
    function = attention_function(op, case, mask, target.backend)
    inputs = leaves(case, mask, op, torch.float32)
    weights = torch.randn(1000, device=target.device)

    def run(inputs: list[Tensor], enabled: bool) -> list[Tensor]:
        with torch.autocast(target.device, dtype, enabled=enabled):
            out, lse = function(*inputs)
            assert lse is None or lse.dtype == torch.float32
        value = (out.float() * weights[: out.shape[-1]]).sum()
        return [out, *torch.autograd.grad(value, inputs)]

    by_hand = [x.detach().to(dtype).requires_grad_() for x in inputs]
    for actual, expected in zip(run(inputs, True), run(by_hand, False), strict=True):
        assert torch.equal(actual.to(dtype), expected)
    with torch.autocast(target.device, dtype):
        assert function(*(x.double() for x in inputs))[0].dtype == torch.float64


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpoint(op, use_reentrant, dropout_p, target):
    """The recomputation drops the same elements: gradients are those without checkpointing, to the bit."""
    case = replace(CASES["padded"], dropout_p=dropout_p)
    mask = case.mask(target.device)
    function = attention_function(op, case, mask, target.backend)
    grads = []
    for run in (function, lambda *inputs: checkpoint(function, *inputs, use_reentrant=use_reentrant)):
        inputs = leaves(case, mask, op, torch.float32)
        torch.manual_seed(11)
        run(*inputs)[0].square().sum().backward()
        grads.append([x.grad for x in inputs])
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op, target):
    case, mask = CASES["padded"], CASES["padded"].mask(target.device)
    inputs = leaves(case, mask, op, torch.float32)
    out, _ = attention_function(op, case, mask, target.backend)(*inputs)
    grad, *_ = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward .* is not supported"):
        grad.sum().backward()


def test_no_gradient_asked_for(target):
    """Frozen keys and values: only q gets a gradient; inference mode works."""
    mask = CASE.mask(target.device)
    q, k, v = leaves(CASE, mask, "banded", torch.float32)
    k.requires_grad_(False), v.requires_grad_(False)
    function = attention_function("banded", CASE, mask, target.backend)
    function(q, k, v)[0].sum().backward()
    assert q.grad is not None
    assert k.grad is None
    with torch.inference_mode():
        out, _ = function(q, k, v)
    assert not out.requires_grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True])
def test_meta_tensors(op, packed):
    """Shapes and dtypes without data, with the gradients' too."""
    mask = replace(CASE, packed=packed).mask()
    real = leaves(replace(CASE, packed=packed), mask, op, torch.bfloat16)
    inputs = [x.detach().to("meta").requires_grad_() for x in real]
    out, lse = attention_function(op, CASE, mask.to("meta"), None)(*inputs)
    real_out, real_lse = attention_function(op, CASE, mask, "torch")(*real)
    assert (out.shape, out.dtype) == (real_out.shape, real_out.dtype)
    assert lse is None or (lse.shape, lse.dtype) == (real_lse.shape, real_lse.dtype)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


THREAD_PROBE = """
import os, sys, threading, time
import torch
from led_kernels import LongformerMask, banded_attention

threads, backend = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
mask = LongformerMask.from_lengths([2048], 2048, [0])
q, k, v = torch.randn(3, 1, 2048, 4, 32)

def measure():
    run = lambda: banded_attention(q, k, v, mask, window_size=256, backend=backend)
    before = len(os.listdir("/proc/self/task"))
    run()
    pool = len(os.listdir("/proc/self/task")) - before
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 1.0:
        run()
    print((time.process_time() - cpu) / (time.perf_counter() - wall), pool)

worker = threading.Thread(target=measure)
worker.start()
worker.join()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads(threads, target):
    """``torch.set_num_threads`` holds in a Python thread other than the one that called it."""
    if target.device != "cpu":
        pytest.skip("threads of the CPU")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor only")
    if target.backend == "torch" and threads == 2:
        pytest.skip("torch's own operations start at the default number in another thread")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", THREAD_PROBE, str(threads), target.backend]
    probe = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    busy, pool = map(float, probe.stdout.split())
    assert busy < threads + 0.15, f"{busy:.2f} processors were busy with {threads} threads allowed"
    if target.backend == "cpu":  # whether both are busy depends on what else the machine does
        assert pool == threads - 1, (
            f"the call started {pool:.0f} threads beside its own, {threads - 1} are allowed"
        )


class TestBadInput:
    """One sentence that names the argument; on every backend, as it is checked before."""

    mask = LongformerMask.from_lengths([6, 4], 6, [0])
    qkv = tuple(torch.zeros(2, 6, 2, 8) for _ in range(3))
    q_global = torch.zeros(2, 1, 2, 8)

    def banded(self, error, message, *, q=None, k=None, v=None, mask=None, **settings):
        q, k, v = (x if given is None else given for x, given in zip(self.qkv, (q, k, v), strict=True))
        with pytest.raises(error, match=message):
            banded_attention(q, k, v, self.mask if mask is None else mask, **{"window_size": 2, **settings})

    def test_type(self):
        self.banded(TypeError, "q is a list; give a torch.Tensor", q=[1.0])
        self.banded(TypeError, "mask is a Tensor; build a LongformerMask", mask=torch.ones(2, 6))

    def test_rank(self):
        self.banded(
            ValueError, r"q has shape \(2, 6, 16\); give it as \[batch, seqlen", q=torch.zeros(2, 6, 16)
        )
        packed = LongformerMask.packed([0, 6])
        self.banded(ValueError, r"q has shape .* give it as \[total_rows, heads", mask=packed)

    def test_shape(self):
        self.banded(ValueError, r"k has shape \(2, 6, 3, 8\) and q \(2, 6, 2, 8\)", k=torch.zeros(2, 6, 3, 8))
        self.banded(ValueError, r"v has shape \(2, 6, 2, 9\) and q", v=torch.zeros(2, 6, 2, 9))
        self.banded(ValueError, r"k has shape \(2, 5, 2, 8\) but the mask", k=torch.zeros(2, 5, 2, 8))
        self.banded(ValueError, "q has head_dim 257; 1 to 256", q=torch.zeros(2, 6, 2, 257))
        self.banded(ValueError, "q has head_dim 0; 1 to 256", q=torch.zeros(2, 6, 2, 0))

    def test_dtype(self):
        self.banded(TypeError, "q has dtype torch.int64; give float32", q=torch.zeros(2, 6, 2, 8).long())
        self.banded(TypeError, "q has dtype torch.complex64", q=torch.zeros(2, 6, 2, 8).cfloat())
        self.banded(TypeError, "v has dtype torch.float16 and q torch.float32", v=self.qkv[0].half())
        self.banded((TypeError, ValueError, RuntimeError), "float8", q=self.qkv[0].to(torch.float8_e4m3fn))

    def test_device(self):
        self.banded(ValueError, "k is on meta and mask on cpu", k=self.qkv[0].to("meta"))
        self.banded(ValueError, "q is on cpu and mask on meta", mask=self.mask.to("meta"))

    def test_non_contiguous_last_dimension(self):
        self.banded(ValueError, r"k has a non-contiguous last dimension \(stride 12\)", k=self.qkv[0].transpose(1, 3)
                    .contiguous().transpose(1, 3))  # fmt: skip

    @pytest.mark.parametrize("window_size", [-2, (-2, 3), (3, -5)])
    def test_window_below_minus_one(self, window_size):
        self.banded(
            ValueError, "window_size is .*; give 0 or more on each side, or -1", window_size=window_size
        )

    @pytest.mark.parametrize("window_size", [2.0, "2", None, (1,), (1, 2, 3), (1.0, 2), True])
    def test_window_of_another_type(self, window_size):
        self.banded(TypeError, "window_size is .*; give an int or a pair", window_size=window_size)

    @pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan")])
    def test_dropout_p(self, dropout_p):
        self.banded(ValueError, "dropout_p is .*; give a probability", dropout_p=dropout_p)

    def test_backend(self):
        self.banded(ValueError, "backend is 'metal'; give one of reference", backend="metal")

    def test_global(self):
        _, k, v = self.qkv
        cases = [
            (self.q_global[:, :, :, :4], k, v, ValueError, "q_global has head_dim 4 and k_global 8"),
            (
                torch.zeros(2, 3, 2, 8),
                k,
                v,
                ValueError,
                r"q_global has shape \(2, 3, 2, 8\); give \[batch, max_glo",
            ),
            (torch.zeros(2, 1, 8), k, v, ValueError, "q_global has shape"),
            (
                self.q_global.double(),
                k,
                v,
                TypeError,
                "k_global has dtype torch.float32 and q_global torch.float64",
            ),
            (self.q_global.to("meta"), k, v, ValueError, "k_global is on cpu and q_global on meta"),
            (self.q_global, k[:, :5], v, ValueError, "k_global has shape .* but the mask"),
            (self.q_global, k, v.half(), TypeError, "v_global has dtype torch.float16 and k_global"),
            ("q", k, v, TypeError, "q_global is a str"),
        ]
        for q_global, k_global, v_global, error, message in cases:
            with pytest.raises(error, match=message):
                global_attention(q_global, k_global, v_global, self.mask)
        with pytest.raises(TypeError, match="mask is a Tensor"):
            global_attention(self.q_global, k, v, torch.ones(2, 6))

    def test_longformer(self):
        q, k, v = self.qkv
        with pytest.raises(ValueError, match="q_global has shape"):
            longformer_attention(q, k, v, self.q_global, k, v, self.mask, window_size=1)

    def test_absorbed(self):
        hidden, weight, bias = torch.zeros(2, 6, 10), torch.zeros(16, 10), torch.zeros(16)
        good = {
            "hidden": hidden,
            "q_global": self.q_global,
            "key_weight": weight,
            "value_weight": weight,
            "value_bias": bias,
            "mask": self.mask,
        }
        assert absorbed_global_attention(**good).shape == (2, 1, 2, 8)
        cases = [
            ("hidden", torch.zeros(2, 10), ValueError),
            ("hidden", torch.zeros(2, 5, 10), ValueError),
            ("hidden", [1.0], TypeError),
            ("hidden", hidden.long(), TypeError),
            ("hidden", hidden.double(), TypeError),
            ("hidden", hidden.to("meta"), ValueError),
            ("q_global", torch.zeros(2, 2, 2, 8), ValueError),
            ("q_global", torch.zeros(2, 16), ValueError),
            ("q_global", self.q_global.half(), TypeError),
            ("key_weight", torch.zeros(10, 16), ValueError),
            ("value_weight", torch.zeros(16, 9), ValueError),
            ("value_weight", weight.half(), TypeError),
            ("value_bias", torch.zeros(8), ValueError),
            ("mask", torch.ones(2, 6), TypeError),
        ]
        for name, value, error in cases:
            with pytest.raises(error, match=name):
                absorbed_global_attention(**{**good, name: value})
