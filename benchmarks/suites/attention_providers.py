"""These providers compute one attention layer, from projected q, k, v.

``banded`` is the attention of the local tokens (band and global keys), ``core`` adds the global tokens'
own attention over everything: all that transformers' ``LEDEncoderSelfAttention`` does between its
projections.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.harness.shapes import Shape
from benchmarks.suites.attention_truth import LEAVES, Inputs
from led_kernels import banded_attention, longformer_attention
from led_kernels.dispatch import BackendUnavailable, can_run

# leaves, each [1, seqlen, heads, head_dim] -> out, the same shape
Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """Names who computes: ``build`` prepares what it may once per shape (a mask, a compilation), and returns a call."""

    build: Callable[[Inputs], Attend]
    has_backward: bool = True
    refusal: Callable[[], str | None] = field(default=lambda: None)


def forward(provider: Provider, inputs: Inputs, leaves: tuple[str, ...]) -> Callable[[], dict[str, Tensor]]:
    """Runs the forward pass alone, with nothing recorded for a backward."""
    attend, tensors = provider.build(inputs), [inputs.tensors[name] for name in leaves]

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"out": attend(*tensors)}

    return call


def forward_backward(
    provider: Provider, inputs: Inputs, leaves: tuple[str, ...]
) -> Callable[[], dict[str, Tensor]]:
    """Runs the forward and, through autograd, computes the gradients of all leaves."""
    attend, d_out = provider.build(inputs), inputs.d_out
    if leaves == LEAVES["banded"]:  # peers compute the global tokens' rows as if local: they are not to count
        d_out = d_out.clone()
        d_out[:, list(inputs.shape.global_index)] = 0
    tensors = [inputs.tensors[name].detach().requires_grad_() for name in leaves]

    def call() -> dict[str, Tensor]:
        out = attend(*tensors)
        gradients = torch.autograd.grad(out, tensors, d_out)
        return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}

    return call


def led_kernels_provider(
    function: Callable[..., Tensor], backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Provider:
    """Returns a provider that is one of the public functions on a named backend."""

    def build(inputs: Inputs) -> Attend:
        return functools.partial(function, mask=inputs.mask, window_size=inputs.shape.window, backend=backend)

    def refusal() -> str | None:
        try:
            can_run(backend, torch.device(device), dtype, raise_error=True)
        except BackendUnavailable as error:
            return str(error)
        return None

    return Provider(build, refusal=refusal)


def allowed_pairs(shape: Shape) -> Callable[..., Tensor]:
    """Returns band and global keys as flex_attention's ``mask_mod`` (batch, head, query, key).

    A comparison with the global positions: a lookup in a table of flags was slower. The global tokens' own
    rows are allowed what local ones are, and not looked at.
    """
    window, global_index = shape.window, shape.global_index

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = (query - key).abs() <= window
        for position in global_index:
            result = result | (key == position)
        return result

    return allowed


def _build_flex(inputs: Inputs) -> Attend:
    """Compiles ``flex_attention`` with the block mask made beforehand, on its own contiguous layout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seqlen = inputs.shape.seqlen
    block_mask = create_block_mask(allowed_pairs(inputs.shape), 1, 1, seqlen, seqlen, device="cpu")
    # a fresh compilation per shape: never the slower code for sizes known only at run time
    compiled = torch.compile(flex_attention, dynamic=False)
    # [1, heads, seqlen, head_dim]
    q, k, v = (inputs.tensors[name].transpose(1, 2).contiguous() for name in LEAVES["banded"])
    return lambda *_: compiled(q, k, v, block_mask=block_mask).transpose(1, 2)


def _no_compiler() -> str | None:
    if any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        return None
    return "torch.compile finds no C++ compiler; install one."


class _Given(nn.Module):
    """Takes the place of a projection and returns what was projected before.

    The result is a copy for the query, which the stock module scales in place.
    """

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.projected: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projected.clone() if self.copies else self.projected


def build_transformers(inputs: Inputs) -> Attend:
    """Builds on the stock ``LEDEncoderSelfAttention.forward`` itself, its six projections replaced by given tensors.

    So everything else runs as released (chunked scores, masks, softmax, chunked products with v, global
    tokens). Extra to it is one copy of q, under 1 % of its time.
    """
    from transformers import LEDConfig
    from transformers.models.led.modeling_led import LEDEncoderSelfAttention

    shape = inputs.shape
    config = LEDConfig(
        d_model=shape.d_model, encoder_attention_heads=shape.heads, encoder_layers=1,
        attention_window=[2 * shape.window],
    )  # fmt: skip
    module = LEDEncoderSelfAttention(config, layer_id=0).eval()
    for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
        setattr(module, name, _Given(copies=name == "query"))
    hidden = torch.zeros(1, shape.seqlen, shape.d_model, dtype=shape.torch_dtype, device=shape.device)
    rows = list(shape.global_index)
    is_global = torch.zeros(1, shape.seqlen, dtype=torch.bool, device=shape.device)
    is_global[:, rows] = True
    masks = {
        "attention_mask": torch.where(is_global, 10000.0, 0.0),
        "is_index_masked": torch.zeros_like(is_global),
        "is_index_global_attn": is_global,
        "is_global_attn": bool(rows),
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, *projected_globally: Tensor) -> Tensor:
        q_global, k_global, v_global = projected_globally
        given = {
            "query": q, "key": k, "value": v,
            "query_global": q_global[:, rows], "key_global": k_global, "value_global": v_global,
        }  # fmt: skip
        for name, x in given.items():
            module.get_submodule(name).projected = x.flatten(2).transpose(0, 1)  # [seqlen, 1, d_model]
        (out,) = module(hidden, **masks)
        return out.view(q.shape)

    return attend


CPU, TORCH, FLEX, STOCK = "led_kernels cpu", "led_kernels torch", "flex_attention", "transformers"
BANDED = {
    CPU: led_kernels_provider(banded_attention, "cpu"),
    TORCH: led_kernels_provider(banded_attention, "torch"),
    FLEX: Provider(_build_flex, has_backward=False, refusal=_no_compiler),
}
CORE = {
    CPU: led_kernels_provider(longformer_attention, "cpu"),
    STOCK: Provider(build_transformers),
}
