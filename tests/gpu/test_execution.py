"""torch.compile, CUDA graphs, streams, devices: the kernels take part as torch's own do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from led_kernels import LongformerMask, longformer_attention

pytestmark = pytest.mark.gpu

BATCH, SEQLEN, HEADS, HEAD_DIM, MAX_GLOBALS = 2, 700, 4, 64, 3


def inputs(seed: int, device: str = "cuda") -> list[Tensor]:
    """Makes q, k, v, q_global, k_global, v_global in fp16, which every GPU takes, and both attention masks."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(6, BATCH, SEQLEN, HEADS, HEAD_DIM, generator=generator).half()
    lengths = torch.randint(SEQLEN // 2, SEQLEN, (BATCH, 1), generator=generator)
    attention_mask = (torch.arange(SEQLEN) < lengths).long()
    global_attention_mask = torch.zeros_like(attention_mask)
    global_attention_mask[:, torch.randint(0, SEQLEN // 2, (MAX_GLOBALS,), generator=generator)] = 1
    return [x.to(device) for x in (*qkv, attention_mask, global_attention_mask)]


def attend(*tensors: Tensor, backend: str, dropout_p: float = 0.0) -> Tensor:
    """Makes a mask of fixed capacity from the last two, and runs the attention."""
    *qkv, attention_mask, global_attention_mask = tensors
    mask = LongformerMask.from_padding(attention_mask, global_attention_mask, max_globals=MAX_GLOBALS)
    return longformer_attention(*qkv, mask, window_size=(100, 64), dropout_p=dropout_p, backend=backend)


def run(tensors: list[Tensor], function: Callable[..., Tensor] = attend, **settings) -> list[Tensor]:
    """Returns out, and the gradients of q … v_global."""
    leaves = [x.detach().requires_grad_() for x in tensors[:6]]
    out = function(*leaves, *tensors[6:], **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compares bit for bit: the kernels are deterministic."""
    for x, y in zip(actual, expected, strict=True):
        assert not y.isnan().any()
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_without_graph_breaks(mode, backend):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for seed in range(3):
        actual = [x.clone() for x in run(inputs(seed), compiled, backend=backend)]
        assert_same(actual, run(inputs(seed), backend=backend))


def capture(static: list[Tensor], **settings) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Captures a graph of forward and backward on ``static``, and the tensors that its replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, **settings)  # compiles or loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(static, **settings)
    return graph, results


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_graph_replay_with_new_inputs(dropout_p, backend):
    """Other values, lengths, global tokens and dropout; the mask and the seed are made within the graph."""
    settings = {"backend": backend, "dropout_p": dropout_p}
    static = inputs(0)
    graph, results = capture(static, **settings)
    for seed in (1, 2, 0):
        for x, new in zip(static, inputs(seed), strict=True):
            x.copy_(new)
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.manual_seed(seed)
        assert_same(results, run(inputs(seed), **settings))


def test_graph_replay_draws_new_dropout(backend):
    graph, (out, *_) = capture(inputs(0), backend=backend, dropout_p=0.3)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_two_streams_at_once(backend):
    expected = [run(inputs(seed), backend=backend) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    tensors = [inputs(seed) for seed in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(run(tensors[i], backend=backend))
    torch.cuda.synchronize()
    for i in range(2):
        for result in results[i]:
            assert_same(result, expected[i])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_host_sync(dropout_p, backend):
    tensors = inputs(0)
    run(tensors, backend=backend, dropout_p=dropout_p)  # compiles or loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tensors, backend=backend, dropout_p=dropout_p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("current", "device"), [(0, 1), (1, 0), (1, 1)])
def test_device_of_the_tensors(current, device, backend):
    """It is selected for the launches alone, and need not be the current one."""
    expected = run(inputs(0, "cuda:0"), backend=backend)
    with torch.cuda.device(current):
        actual = run(inputs(0, f"cuda:{device}"), backend=backend)
        assert torch.cuda.current_device() == current
        assert torch.ones(1, device="cuda").device.index == current
    assert {x.device for x in actual} == {torch.device("cuda", device)}
    assert_same([x.to(expected[0].device) for x in actual], expected)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_errors_of_cuda_are_exceptions_in_its_words(backend):
    """Here of a device that is not there; what comes next finds nothing of the error."""
    from led_kernels import _C

    expected = run(inputs(0), backend=backend)
    params = _C.AttentionParams()
    params.head_dim, params.device = HEAD_DIM, torch.cuda.device_count()
    with pytest.raises(RuntimeError, match="CUDA failed to select the device: invalid device ordinal"):
        _C.cuda_banded_forward(params)
    torch.cuda.synchronize()
    assert_same(run(inputs(0), backend=backend), expected)
