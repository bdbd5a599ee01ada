"""What a decoding step is bound by: weights, keys and values that are read from memory once for a few rows.

On the CPU, torch's matrix products and SDPA read them at a half to a fifth of the bandwidth; there the compiled kernels
of ``csrc/cpu/few_rows.h`` serve. Everywhere else, and wherever a gradient may be wanted, these functions are torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_kernels.dispatch import backend_module, choose_backend
from led_kernels.projection import is_plain_linear

_FEW = 16  # rows, from which on torch is as fast


def few_rows_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; by a kernel when ``module`` is a plain ``nn.Linear`` and ``x`` has at most 16 rows.

    Args:
        module: hooked, quantised and adapted modules are called as they are.
        x: ``[..., in_features]``, in the dtype of the weight.

    Returns:
        ``[..., out_features]``.
    """
    if not (is_plain_linear(module) and _is_served(x, x.numel() // x.shape[-1], module.weight)):
        return module(x)
    return backend_module("cpu").few_rows_linear(x, module.weight, module.bias)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """``scaled_dot_product_attention(q, k, v, visible)``; by a kernel for at most 16 queries.

    Args:
        q: ``[batch, heads, queries, head_dim]``.
        k, v: ``[batch, heads, keys, head_dim]``.
        visible: which keys a query sees, ``[batch or 1, 1, queries or 1, keys]``, bool; of another dtype, added to the
            scores by torch. Default: all. A query must see one key at least.

    Returns:
        ``[batch, heads, queries, head_dim]``.
    """
    is_bool = visible is None or visible.dtype == torch.bool
    if not (is_bool and _is_served(q, q.shape[2], k)):
        return F.scaled_dot_product_attention(q, k, v, visible)
    return backend_module("cpu").decode_attention(q, k, v, visible)


def _is_served(x: Tensor, rows: int, other: Tensor) -> bool:
    return (
        0 < rows <= _FEW
        and x.device.type == "cpu"
        and x.dtype == other.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and choose_backend(x.device, x.dtype) == "cpu"
    )
