"""``benchmarks.report.gpu_report`` times these: the GPU kernels beside their peers, all on the shape's device.

``banded`` and ``core`` are those of ``benchmarks.suites.attention``. The groups ``window_…`` are the band alone,
without global tokens, which is all that flash-attn's window does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness.cases import Group
from benchmarks.harness.shapes import Shape
from benchmarks.suites.attention import attention_cases
from benchmarks.suites.attention_providers import (
    FLEX,
    STOCK,
    Attend,
    Provider,
    allowed_pairs,
    build_transformers,
    led_kernels_provider,
)
from benchmarks.suites.attention_truth import Inputs
from benchmarks.suites.yardsticks import yardstick_cases
from led_kernels import banded_attention, longformer_attention

BACKENDS = ("triton", "cuda")  # of led_kernels
SDPA, FLASH = "dense SDPA", "flash-attn window"
SEQLENS = (1024, 4096, 16384)
SHAPE = Shape(dtype="bfloat16", device="cuda")


def groups(
    backends: Sequence[str] = BACKENDS, shape: Shape | None = None, seqlens: Sequence[int] = SEQLENS
) -> list[Group]:
    """Returns for each length a group with global tokens and one without.

    Args:
        backends: of led_kernels.
        shape: all but the length; default ``SHAPE``, in fp16 on a GPU whose tensor cores know no bf16.
    """
    shape = shape or _shape_of_this_gpu()
    banded, core = (
        {
            f"led_kernels {name}": led_kernels_provider(function, name, shape.device, shape.torch_dtype)
            for name in backends
        }
        for function in (banded_attention, longformer_attention)
    )
    flex = Provider(_build_flex, has_backward=shape.device != "cpu")
    with_globals = {
        "banded": {**banded, FLEX: flex, SDPA: Provider(_build_dense)},
        "core": {**core, STOCK: Provider(build_transformers, refusal=_missing("transformers"))},
    }
    window = {
        "banded": {**banded, FLASH: Provider(_build_flash, refusal=_missing("flash_attn", "flash-attn"))}
    }
    result = []
    for seqlen in seqlens:
        s = replace(shape, seqlen=seqlen)
        cases = yardstick_cases(s, smoke=s.device == "cpu") + attention_cases(s, with_globals)
        result.append(Group(f"attention_{seqlen}", s, cases))
        s = replace(s, global_index=())
        result.append(Group(f"window_{seqlen}", s, attention_cases(s, window)))
    return result


def _shape_of_this_gpu() -> Shape:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return replace(SHAPE, dtype="float16")
    return SHAPE


def _build_flex(inputs: Inputs) -> Attend:
    """Compiles ``flex_attention`` on views of the tensors, with the block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seqlen, device = inputs.shape.seqlen, inputs.shape.device
    block_mask = create_block_mask(allowed_pairs(inputs.shape), 1, 1, seqlen, seqlen, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return _on_heads_first(functools.partial(compiled, block_mask=block_mask))


def _build_dense(inputs: Inputs) -> Attend:
    """Builds ``scaled_dot_product_attention`` under the whole mask, ``[seqlen, seqlen]``."""
    position = torch.arange(inputs.shape.seqlen, device=inputs.shape.device)
    allowed = allowed_pairs(inputs.shape)(0, 0, position[:, None], position)
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=allowed)
    return _on_heads_first(dense)


def _build_flash(inputs: Inputs) -> Attend:
    from flash_attn import flash_attn_func

    window = (inputs.shape.window, inputs.shape.window)
    return lambda q, k, v: flash_attn_func(q, k, v, window_size=window)


def _on_heads_first(attend: Callable[..., Tensor]) -> Attend:
    """Lets a function on ``[1, heads, seqlen, head_dim]`` take ``[1, seqlen, heads, head_dim]``."""
    return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def _missing(module: str, package: str | None = None) -> Callable[[], str | None]:
    def refusal() -> str | None:
        return None if importlib.util.find_spec(module) else f"{package or module} is not installed."

    return refusal
