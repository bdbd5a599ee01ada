"""Ranks the tile sizes of the Triton kernels on this machine's GPU and prints rows for ``configs.py``.

One kernel varies at a time: the op that launches it is timed with every candidate in turn, the others keep their
configuration. Candidates that do not fit the GPU are left out; those that compile with spilled registers are ranked
like any other, by their time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from benchmarks.harness.shapes import Shape
from led_kernels.backends.triton import configs
from led_kernels.backends.triton.configs import KERNELS, Row, TileConfig
from led_kernels.call import AttentionCall
from led_kernels.mask import LongformerMask

_MANY = 64  # global tokens, where a kernel is for many
BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3)
DTYPES = ("float16", "bfloat16", "float32")
_OPS = {
    "banded_forward": "banded_forward",
    "banded_dq": "banded_backward",
    "banded_dkdv": "banded_backward",
    "banded_dkdv_globals": "banded_backward",
    "global_forward": "global_forward",
    "global_forward_many": "global_forward",
    "global_dq": "global_backward",
    "global_dq_many": "global_backward",
    "global_dkdv_many": "global_backward",
}


def candidates() -> list[TileConfig]:
    """Returns every combination of block sizes, warps and pipeline stages."""
    return [TileConfig(*values) for values in itertools.product(BLOCKS, BLOCKS, WARPS, STAGES)]


def calls(kernel: str, shape: Shape, dropout_p: float) -> Callable[[], object]:
    """Returns the backend's op that launches ``kernel``, on random inputs of one layer."""
    from led_kernels.backends import triton as backend

    op, device, dtype = _OPS[kernel], shape.device, shape.torch_dtype
    tokens = range(_MANY if kernel.endswith("_many") else 1)
    lengths = torch.tensor([shape.seqlen])
    mask = LongformerMask.from_lengths(lengths, shape.seqlen, global_index=list(tokens)).to(device)
    qkv = torch.randn(1, shape.seqlen, 3, shape.heads, shape.head_dim, dtype=dtype, device=device)
    q, k, v = qkv.unbind(2)
    window = (shape.window, shape.window) if op.startswith("banded") else None
    if window is None:
        q = q[:, : mask.max_globals].contiguous()
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    call = AttentionCall(q, k, v, mask, window, shape.head_dim**-0.5, dropout_p, seed)
    if op.endswith("forward"):
        return lambda: backend.forward(call)
    out, lse = backend.forward(call)
    d_out = torch.randn_like(out)
    return lambda: backend.backward(call, out, lse, d_out, None)


@contextlib.contextmanager
def configured(kernel: str, config: TileConfig) -> Iterator[None]:
    """Runs ``kernel`` with ``config`` within the context, and other kernels as they would."""
    name = "LED_KERNELS_TRITON_CONFIG"
    before = os.environ.get(name)
    os.environ[name] = f"{kernel}=" + "x".join(str(n) for n in config)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def rank(
    kernel: str, shape: Shape, dropout_p: float, measure: Callable[[Callable[[], object]], float]
) -> list[tuple[float, TileConfig]]:
    """Returns the candidates that run, fastest first, with what ``measure`` says of the op (ms)."""
    from triton.runtime.errors import OutOfResources

    run, ranking = calls(kernel, shape, dropout_p), []
    for config in tqdm(candidates(), desc=f"{kernel}, head_dim {shape.head_dim}", unit="config", leave=False):
        with configured(kernel, config), contextlib.suppress(OutOfResources):
            ranking.append((measure(run), config))
    return sorted(ranking)


def format_row(target: str, shape: Shape, dropout_p: float, ranking: list[tuple[float, TileConfig]]) -> str:
    """Formats the fastest candidate as a row of ``configs.TABLE``, its reason what was measured."""
    time, config = ranking[0]
    runner_up = f", {ranking[1][0] / time:.2f} x faster than {tuple(ranking[1][1])}" if ranking[1:] else ""
    reason = f"fastest of {len(ranking)} on {torch.cuda.get_device_name()}{runner_up}"
    bits = shape.torch_dtype.itemsize * 8
    row = Row((target,), bits, shape.head_dim, dropout_p > 0, config, reason)
    return f"{row!r},"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Times the candidates for each kernel's tile sizes on this machine's GPU, and prints a row for "
        "led_kernels/backends/triton/configs.py per kernel and head_dim as soon as it is ranked.",
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="default: all")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="default: 0")
    parser.add_argument("--seqlen", type=int, default=16384, help="default: %(default)s tokens")
    parser.add_argument("--window", type=int, default=512, help="one-sided, inclusive; default: %(default)s")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="also print the N fastest as comments"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed; needs no GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.dry_run:
        for kernel, head_dim in itertools.product(args.kernel, args.head_dim):
            print(f"{kernel}, head_dim {head_dim}, {args.dtype}: {len(candidates())} candidates")
        return 0
    if not torch.cuda.is_available():
        print(
            "benchmarks.tune times kernels on a GPU and torch sees none; --dry-run lists them.",
            file=sys.stderr,
        )
        return 2
    from triton.testing import do_bench

    for kernel, head_dim in itertools.product(args.kernel, args.head_dim):
        shape = Shape(args.seqlen, head_dim=head_dim, window=args.window, dtype=args.dtype, device="cuda")
        ranking = rank(kernel, shape, args.dropout, lambda run: do_bench(run, return_mode="median"))
        print(f"# {kernel}")
        for time, config in ranking[: args.show]:
            print(f"#   {tuple(config)}: {time:.3f} ms")
        print(format_row(configs.current_target(), shape, args.dropout, ranking), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
