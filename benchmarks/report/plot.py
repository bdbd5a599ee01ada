"""``python -m benchmarks.report.plot`` draws the README's pictures from the CSVs of runs, the pattern from a mask."""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.harness import table
from benchmarks.harness.cases import FORWARD, FORWARD_BACKWARD
from benchmarks.harness.figures import Run, efficiency, ratio
from benchmarks.suites import catalog, encoder, learning, memory
from benchmarks.suites.attention_providers import BANDED, CPU, FLEX, STOCK, TORCH
from led_kernels import LongformerMask
from led_kernels.mask import GLOBAL, PADDING

INK, GRID, OURS, PEER, BAND, GLOBAL_KEYS, GLOBAL_QUERIES = (
    "#333333", "#e4e4e4", "#3a6ea5", "#b8bec6", "#8fb3d9", "#e8a33d", "#c8553d",
)  # fmt: skip
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}


def plot_pattern(path: Path) -> None:
    """Draws who sees whom, for 24 tokens of which two are global and the last four padding."""
    seqlen, window = 24, 4
    mask = LongformerMask.from_lengths([seqlen - 4], seqlen, [0, 9])
    kind = mask.token_kind[0]
    position = torch.arange(seqlen)
    real = (kind[:, None] != PADDING) & (kind != PADDING)
    picture = ((position[:, None] - position).abs() <= window).int()
    picture[:, kind == GLOBAL] = 2
    picture[kind == GLOBAL] = 3
    picture[~real] = 0
    figure, axes = plt.subplots(figsize=(5.2, 5.2))
    axes.pcolormesh(
        picture.numpy(), cmap=ListedColormap(["#f4f4f4", BAND, GLOBAL_KEYS, GLOBAL_QUERIES]), vmin=0, vmax=3,
        edgecolors="white", linewidth=1,
    )  # fmt: skip
    axes.set(aspect="equal", xticks=[], yticks=[], xlabel="key", ylabel="query")
    axes.invert_yaxis()
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    labels = {
        BAND: f"band, ±{window} tokens",
        GLOBAL_KEYS: "global keys, seen by all",
        GLOBAL_QUERIES: "global queries, see all",
    }
    patches = [Patch(color=color, label=label) for color, label in labels.items()]
    patches.append(
        Patch(facecolor="#f4f4f4", edgecolor="#cccccc", label="not seen (the last four tokens are padding)")
    )
    axes.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncol=2, frameon=False, fontsize=9
    )
    _save(figure, path)


def plot_efficiency(run: Run, path: Path) -> None:
    """Draws FLOP per second of the banded attention as a fraction of ``torch.mm``'s in the same run."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, layout="constrained")
    for axes, direction in zip(panels, (FORWARD, FORWARD_BACKWARD), strict=True):
        bars = []
        for group in run.groups("attention"):
            for provider in BANDED:
                row = run.row(group, "banded", provider, direction)
                if row:
                    bars.append((f"{provider}, {row.seqlen:,}", efficiency(row, run.rate(group)), provider))
        _bars(axes, bars, CPU)
        axes.set(title=direction, xlabel="FLOP/s in the band ÷ torch.mm's")
    _save(figure, path)


def plot_speedup(run: Run, path: Path) -> None:
    """Draws how many times as long the peers take as the compiled kernels."""
    peers = (
        ("banded", TORCH),
        ("banded", FLEX),
        ("core", STOCK),
    )
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True, layout="constrained")
    for axes, direction in zip(panels, (FORWARD, FORWARD_BACKWARD), strict=True):
        bars = []
        for group in run.groups("attention"):
            for what, provider in peers:
                peer, ours = (run.row(group, what, name, direction) for name in (provider, CPU))
                if peer and ours:
                    bars.append((f"{provider}, {peer.seqlen:,}", ratio(peer, ours), provider))
        _bars(axes, bars, unit=" ×")
        axes.set(title=direction, xlabel="time ÷ time of led_kernels cpu", xscale="log")
        axes.set_xlim(left=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    _save(figure, path)


def plot_encoder(run: Run, path: Path) -> None:
    """Draws time and peak memory of a whole encoder beside transformers'."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.2), layout="constrained")
    for axes, what, column in zip(panels, ("encoder", "memory"), ("median_ms", "peak_mib"), strict=True):
        bars = []
        for group in run.groups("encoder"):
            stock = run.row(group, what, encoder.STOCK)
            rows = [run.row(group, what, provider) for provider in encoder.PROVIDERS]
            if what == "encoder":
                rows.insert(0, run.row(group, "linears", "torch.nn"))
            bars += [
                (_label(row), ratio(row, stock, column), "" if row.what == "linears" else row.provider)
                for row in rows
                if row and stock
            ]
        _bars(axes, bars, encoder.OWN, encoder.DROP_IN)
        title = "time" if what == "encoder" else "peak memory above the weights"
        axes.set(title=f"{title} ÷ transformers'")
    _save(figure, path)


def plot_learning(rows: list[learning.Row], path: Path) -> None:
    """Draws the losses of a training run over its steps, and a unigram model's as a line."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    steps = [row.step for row in rows]
    # A training loss is a mean over the steps since the row before, and stands in their middle.
    middles = [(row.step + before.step) / 2 for before, row in pairwise(rows)]
    axes.plot(middles, [row.training_loss for row in rows[1:]], color=PEER, label="training")
    validation = [row.validation_loss for row in rows]
    axes.plot(steps, validation, color=OURS, marker="o", markersize=3, label="validation")
    unigram = rows[-1].unigram_loss
    axes.axhline(unigram, color=GLOBAL_QUERIES, linestyle="--", label="validation, unigram model")
    for loss, color in ((unigram, GLOBAL_QUERIES), (validation[-1], OURS)):
        axes.annotate(
            f"{loss:.2f}", (steps[-1], loss), (0, 4), textcoords="offset points", ha="right", color=color
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", xlim=(0, None))
    axes.grid(axis="y", color=GRID)
    axes.tick_params(length=0)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_memory(path: Path) -> None:
    """Draws what a step of fine-tuning is predicted to take on a GPU, by the length of the document."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
    colors = {encoder.STOCK: PEER, encoder.DROP_IN: BAND, encoder.OWN: OURS}
    for axes, model in zip(panels, memory.MODELS, strict=True):
        for gpu in (24, 80):
            axes.axhline(gpu, color=GLOBAL_QUERIES, linewidth=0.8, linestyle=":")
            axes.annotate(f"{gpu} GB", (memory.LENGTHS[0], gpu), (0, 2), textcoords="offset points", fontsize=8,
                          color=GLOBAL_QUERIES)  # fmt: skip
        for provider, color in colors.items():
            for checkpointing, style in ((False, "-"), (True, "--")):
                totals = [memory.total_gb(model, provider, n, checkpointing) for n in memory.LENGTHS]
                label = f"{provider}{', checkpointed' if checkpointing else ''}"
                # Both of ours take the same, so the line below is wide enough to be seen.
                width, size = (5, 7) if provider == encoder.DROP_IN else (1.5, 3)
                axes.plot(memory.LENGTHS, totals, style, color=color, linewidth=width, marker="o", markersize=size,
                          label=label)  # fmt: skip
        axes.set(title=model, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(memory.LENGTHS, [f"{n // 1024}k" for n in memory.LENGTHS])
        axes.set_yticks((4, 8, 16, 32, 64, 128, 256), ("4", "8", "16", "32", "64", "128", "256"))
        axes.minorticks_off()
        axes.grid(color=GRID)
        axes.tick_params(length=0)
    panels[0].set_ylabel("GB, predicted")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False,
                  fontsize=9)  # fmt: skip
    _save(figure, path)


def _label(row: table.Row) -> str:
    return "its linear layers alone" if row.what == "linears" else row.provider


def _bars(axes: Axes, bars: list[tuple[str, float, str]], *ours: str, unit: str = "") -> None:
    """Draws horizontal bars ``(label, value, provider)``, first on top, ours in color, with their values."""
    labels, values, providers = zip(*bars, strict=True) if bars else ((), (), ())
    drawn = axes.barh(labels, values, color=[OURS if provider in ours else PEER for provider in providers])
    axes.bar_label(drawn, [f"{value:.{2 if value < 10 else 0}f}{unit}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID)
    axes.tick_params(length=0)
    axes.margins(x=0.12)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.plot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("csv", type=Path, nargs="?", default=catalog.CPU)
    parser.add_argument("--out", type=Path, default=table.RESULTS, help="directory for the PNG files")
    arguments = parser.parse_args(argv)
    with plt.rc_context(STYLE):
        plot_pattern(arguments.out / "pattern.png")
        plot_memory(arguments.out / "memory.png")
        plot_learning(table.read(learning.DEFAULT, learning.Row), arguments.out / "learning.png")
        if not arguments.csv.exists():
            print(f"{arguments.csv} is not there; run python -m benchmarks first.", file=sys.stderr)
            return 1
        run = Run(table.read(arguments.csv))
        plot_efficiency(run, arguments.out / "efficiency.png")
        plot_speedup(run, arguments.out / "speedup.png")
        plot_encoder(run, arguments.out / "encoder.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
