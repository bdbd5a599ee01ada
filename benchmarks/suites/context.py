"""This suite counts what a rank sends and keeps where documents are split over 8 ranks, and computes one rank's part.

One rank of a process group without peers (torch's "fake" backend) runs for real; what others would send are zeros,
which changes neither sizes nor work. The rank is one in the middle, which has neighbors on both sides.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.harness import figures as harness_figures
from benchmarks.harness import table
from benchmarks.harness.figures import Figure
from benchmarks.harness.saved_tensors import saved_tensors
from benchmarks.suites.encoder import OWN
from benchmarks.suites.memory import finetuning
from benchmarks.suites.step_memory.predict import predict
from benchmarks.suites.step_memory.step import LED_BASE, Sizes
from led_kernels import LongformerMask
from led_kernels.distributed.context import ContextParallelMask
from led_model import LEDConfig
from led_model.modeling.layers import EncoderLayer

DEFAULT = table.RESULTS / "context.csv"
RANKS, RANK = 8, 3
SENT_LENGTHS = (16384, 32768, 65536)
KEPT_LENGTH, LONGEST = 65536, 2**20
SMOKE = Sizes(d_model=32, heads=2, ffn_dim=80, window=16)
SENT, SENT_BACK, KEPT, KEPT_WHOLE, PEAK = (
    "sent per layer, forward", "sent per layer, backward", "kept per layer by a rank", "kept per layer by one process",
    "peak of a layer's forward and backward on a rank",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Holds how many ``bytes`` one rank sends or keeps of documents with so many ``tokens``."""

    what: str
    tokens: int
    ranks: int
    bytes: int
    dtype: str
    window: int
    globals: int
    torch: str = ""


def layer_of(sizes: Sizes, dtype: torch.dtype) -> EncoderLayer:
    """Builds one encoder layer, with the dropout of released checkpoints."""
    config = LEDConfig(
        d_model=sizes.d_model, encoder_attention_heads=sizes.heads, encoder_ffn_dim=sizes.ffn_dim,
        attention_window=2 * sizes.window, decoder_attention_heads=sizes.heads, dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return EncoderLayer(config, 0).to(dtype).train()


@contextmanager
def one_rank_of(ranks: int, rank: int) -> Generator[None]:
    """Makes this process one of a group whose others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def counted() -> Generator[Callable[[], int]]:
    """Counts the bytes that collectives are given within the block."""
    total = 0

    def counting(function: Callable, position: int) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal total
            given = args[position]
            assert isinstance(given, Tensor)
            total += given.nbytes
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, 1)),
        mock.patch.object(dist, "broadcast", counting(dist.broadcast, 0)),
    ):
        yield lambda: total


def mask_of(tokens: int) -> LongformerMask:
    """Returns the mask of one document whose first token is global."""
    return LongformerMask.from_lengths([tokens], tokens, global_index=[0])


def part_of(layer: nn.Module, sizes: Sizes, tokens: int) -> Callable[[], Tensor]:
    """Returns the forward of this rank's part of a document, or of the whole where there is no group."""
    mask: LongformerMask | ContextParallelMask = mask_of(tokens)
    rows = tokens
    if dist.is_initialized():
        mask = ContextParallelMask(mask_of(tokens), dist.group.WORLD)
        rows = mask.own.stop - mask.own.start
    dtype = next(layer.parameters()).dtype
    hidden = torch.randn(1, rows, sizes.d_model, dtype=dtype).requires_grad_()
    return lambda: layer(hidden, mask)


def count_sent(sizes: Sizes, tokens: int) -> tuple[int, int]:
    """Returns the bytes that a rank sends in a layer's forward, and in its backward, in bf16."""
    forward = part_of(layer_of(sizes, torch.bfloat16), sizes, tokens)
    with counted() as total:
        out = forward()
        in_forward = total()
        out.sum().backward()
        return in_forward, total() - in_forward


def count_kept(sizes: Sizes, tokens: int) -> int:
    """Returns the bytes that a layer keeps for its backward, in fp32."""
    layer = layer_of(sizes, torch.float32)
    return sum(saved.nbytes for saved in saved_tensors(layer, part_of(layer, sizes, tokens)))


def peak_of_part(sizes: Sizes, tokens: int) -> int:
    """Computes this rank's part of one layer, forward and backward, in fp32, and returns what that takes at its peak.

    That is the high-water mark of the process above what it held before.
    """
    forward = part_of(layer_of(sizes, torch.float32), sizes, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward().sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _value(rows: list[Row], what: str, tokens: int | None = None) -> int:
    return next(row.bytes for row in rows if row.what == what and tokens in (None, row.tokens))


def figures(rows: list[Row]) -> Iterator[Figure]:
    """Returns what was to be reached."""
    sent = [row for row in rows if row.what == SENT]
    growth = max(row.bytes for row in sent) / min(row.bytes for row in sent)
    yield Figure("sent per layer, longest ÷ shortest document", sent[-1].tokens, 1, growth, is_limit=True)
    kept, whole = _value(rows, KEPT), _value(rows, KEPT_WHOLE)
    tokens = next(row.tokens for row in rows if row.what == KEPT)
    yield Figure(
        f"kept by a rank × {RANKS} ÷ kept by one process", tokens, 1.15, kept * RANKS / whole, is_limit=True
    )


def markdown(rows: list[Row]) -> str:
    """Returns the README's tables and what they show."""
    first = rows[0]
    cells = [
        (row.what, f"{row.tokens:,}", str(row.ranks), row.dtype, f"{row.bytes / 1e6:,.2f}") for row in rows
    ]
    return "\n\n".join(
        [
            table.markdown(
                ("one encoder layer of led-base's shape", "tokens", "ranks", "dtype", "MB"), cells
            ),
            f"Counted on the CPU: what a rank gives to collectives, window ±{first.window}, {first.globals} global "
            f"token, and what autograd keeps; torch {first.torch}.",
            harness_figures.markdown(figures(rows)),
            _on_paper(),
            "Made by `python -m benchmarks context`.",
        ]
    )


def _on_paper() -> str:
    """Returns what a million tokens take on 8 GPUs, by the prediction of the suite `memory` for one rank's rows."""
    rows = LONGEST // RANKS + 2 * LED_BASE.window
    cells = []
    for model in ("led-base", "led-large"):
        for checkpointing in (False, True):
            step = finetuning(model, rows, checkpointing)
            # A rank has the positions of all tokens, and one rank's rows of everything else.
            step = replace(step, sizes=replace(step.sizes, max_source=LONGEST))
            total = predict(OWN, step).total / 1e9
            cells.append((f"{model}{', checkpointed' if checkpointing else ''}", f"{total:.1f}"))
    header = (f"a document of {LONGEST:,} tokens on {RANKS} GPUs", "GB on each")
    note = (
        f"Predicted, as above, for bf16, AdamW, 1,024 targets and {LONGEST // RANKS:,} rows with their halo; weights "
        "are on every GPU, which FSDP2 would share. No GPU has measured it."
    )
    return f"{table.markdown(header, cells)}\n\n{note}"


def run(out: Path, *, smoke: bool, threads: int) -> int:
    """Counts into a new CSV, prints the README's tables and returns the exit status of a command that does so."""
    torch.set_num_threads(threads)
    sizes = SMOKE if smoke else LED_BASE
    scale = 256 if smoke else 1
    rows: list[Row] = []

    def add(what: str, tokens: int, ranks: int, nbytes: int, dtype: str) -> None:
        rows.append(Row(what, tokens, ranks, nbytes, dtype, sizes.window, 1, torch.__version__))
        progress.update()

    with tqdm(total=2 * len(SENT_LENGTHS) + 3, desc="counting", leave=False) as progress:
        with one_rank_of(RANKS, RANK):
            for tokens in (n // scale for n in SENT_LENGTHS):
                for what, nbytes in zip((SENT, SENT_BACK), count_sent(sizes, tokens), strict=True):
                    add(what, tokens, RANKS, nbytes, "bf16")
            rows.sort(key=lambda row: row.what != SENT)
            add(KEPT, KEPT_LENGTH // scale, RANKS, count_kept(sizes, KEPT_LENGTH // scale), "fp32")
            longest = LONGEST // scale
            add(PEAK, longest, RANKS, peak_of_part(sizes, longest), "fp32")
        add(KEPT_WHOLE, KEPT_LENGTH // scale, 1, count_kept(sizes, KEPT_LENGTH // scale), "fp32")
    table.write(out, rows)
    print(markdown(table.read(out, Row)))
    return 0 if smoke or all(figure.is_met for figure in figures(rows)) else 1
