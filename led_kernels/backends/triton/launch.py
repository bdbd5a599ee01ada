"""Triton kernels are launched from here, and the arguments that they share get the kernels' names for them.

Those that are compiled in depend on shapes, dtypes, the tile configuration, torch's setting for tf32 and whether there
is dropout, never on what a tensor holds.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from led_kernels.backends.triton import configs
from led_kernels.backends.triton.configs import TileConfig
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask
from led_kernels.philox import dropout_threshold

# Arguments that differ from call to call. Triton would compile again for each one that is 1 or divisible by 16.
SIZES = (
    "mask_stride_b",
    "lse_stride_b",
    "lse_stride_h",
    "heads",
    "max_globals",
    "window_left",
    "window_right",
    "last_dropped",
)
# So many programs fill a GPU: they are roughly four for each of the 132 multiprocessors of an H100.
MAX_SPLITS = 512
# Offsets inside a tile are int32: 128 rows, the most that a configuration has, reach less than 2^31 elements at strides
# below this one. Contiguous tensors stay below: at most 65,535 heads, a grid's limit, have at most 256 elements each.
WIDE_ROW_STRIDE = 2**24


def sequence_arguments(mask: LongformerMask, **tensors: Tensor) -> dict[str, object]:
    """Returns the arguments for tensors ``[(batch,) rows, heads, head_dim]`` and for the mask.

    A tensor whose rows are ``WIDE_ROW_STRIDE`` elements or more apart, a view into a far larger buffer, is read from a
    contiguous copy. Tensors that a kernel writes are the launcher's own and contiguous, so that none is copied.

    Raises:
        ValueError: for more of what the kernels count over the whole batch than int32 holds.
    """
    heads = tensors["q"].shape[-2]
    for count, what in (
        (mask.batch * mask.max_globals, "slots of global tokens"),
        (mask.batch * heads, "heads of its sequences"),
    ):
        if count >= 2**31:
            raise ValueError(f"mask has {count:,} {what}, a launch serves fewer than 2^31; split the batch.")
    arguments: dict[str, object] = {f"{name}_ptr": x for name, x in mask.tensors()._asdict().items()}
    for name, x in tensors.items():
        x = x.contiguous() if x.stride(-3) >= WIDE_ROW_STRIDE else x
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_stride_b"] = x.stride(0) if x.dim() == 4 else 0
        arguments[f"{name}_stride_s"] = x.stride(-3)
        arguments[f"{name}_stride_h"] = x.stride(-2)
    return arguments | {
        "mask_stride_b": 0 if mask.is_packed else mask.max_seqlen,
        "max_globals": mask.max_globals,
    }


def lse_arguments(lse: Tensor, **same_layout: Tensor | None) -> dict[str, object]:
    """Returns the arguments for lse, ``[(batch,) heads, rows]``, and for tensors of the same layout."""
    return {f"{name}_ptr": x for name, x in {"lse": lse, **same_layout}.items()} | {
        "lse_stride_b": lse.stride(0) if lse.dim() == 3 else 0,
        "lse_stride_h": lse.stride(-2),
    }


def softmax_arguments(call: AttentionCall) -> dict[str, object]:
    """Returns the arguments for scale and dropout: draws up to ``last_dropped`` are dropped, so dropout_p = 1 fits."""
    dropout_p = call.dropout_p
    threshold = dropout_threshold(dropout_p)
    return {
        "softmax_scale": call.softmax_scale,
        "seed_ptr": call.seed,
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 1.0,
        "last_dropped": max(threshold - 1, 0),
        "DROPOUT": threshold > 0,
    }


def window_arguments(call: AttentionCall) -> dict[str, object]:
    """Returns the arguments for both sides of the band."""
    window_left, window_right = call.banded_window
    return {"window_left": window_left, "window_right": window_right}


def block_arguments(config: TileConfig, q: Tensor) -> dict[str, object]:
    """Returns the arguments for tile sizes and for fp32 products: exact, or in tf32 where torch's matmul may use it."""
    head_dim = q.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "PRECISION": "tf32" if q.dtype == torch.float32 and _allows_tf32() else "ieee",
    }


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, object],
    config: TileConfig | None = None,
) -> None:
    """Launches the kernel with those of the arguments that it has parameters for.

    Without a configuration it runs with Triton's default of warps, and ptxas chooses its registers.
    """
    # Triton leaves fusion out from 3.10 on, but the scale shall fold into the exponential's FMA
    options: dict[str, object] = {"enable_fp_fusion": True}
    if config is not None:
        options["num_warps"] = config.num_warps
        if configs.current_target().startswith("sm_"):
            options["maxnreg"] = 255  # left alone, ptxas spills a few registers to fit one more block
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options)


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def descriptor(x: Tensor, block_rows: int) -> TensorDescriptor:
    """Describes ``[(batch,) rows, heads, head_dim]`` to the tensor memory accelerator: ``block_rows`` rows of one head.

    Raises:
        ValueError: an address or stride is no multiple of 16 bytes.
    """
    x = x if x.dim() == 4 else x[None]
    strides = [stride * x.element_size() for stride in x.stride()[:3]]
    if x.data_ptr() % 16 or any(stride % 16 for stride in strides):
        raise ValueError(
            "LED_KERNELS_TRITON_TMA=1 needs k and v whose address and strides are multiples of 16 bytes; "
            "align them or unset it."
        )
    return TensorDescriptor.from_tensor(x, [1, block_rows, 1, padded_head_dim(x.shape[-1])])


def global_key_block(max_globals: int) -> int:
    """Returns the size of a tile of global keys: small, as few are the rule, but many shall not take many products."""
    return 16 if max_globals <= 16 else 64


def split_keys(mask: LongformerMask, heads: int, num_tiles: int, block_n: int) -> tuple[int, int]:
    """Splits the keys of a sequence among the programs of global attention with ``num_tiles`` query tiles.

    Returns:
        num_splits: as many as give ``MAX_SPLITS`` programs in all, but so few that their partial results have no more
            rows (num_splits * max_globals) than a sequence has.
        keys_per_split: how many keys each split has, a multiple of block_n; the last one may have fewer.
    """
    key_tiles = max(1, triton.cdiv(mask.max_seqlen, block_n))
    num_programs = max(1, mask.batch * heads * num_tiles)
    num_splits = min(triton.cdiv(MAX_SPLITS, num_programs), mask.max_seqlen // max(1, mask.max_globals))
    tiles_per_split = triton.cdiv(key_tiles, max(1, num_splits))
    return triton.cdiv(key_tiles, tiles_per_split), tiles_per_split * block_n


def padded_head_dim(head_dim: int) -> int:
    """Rounds head_dim up to a power of two that a dot takes."""
    return max(16, triton.next_power_of_2(head_dim))
