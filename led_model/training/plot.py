"""Draws the losses and ROUGE of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_log(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the entries of a run's log into a PNG.

    Args:
        log: Trainer's, with ``loss`` of steps, and ``eval_loss`` and ``eval_rougeLsum`` of evaluations.
    """
    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes((0.09, 0.12, 0.81, 0.84))
    axes.set(xlabel="updates", ylabel="loss")
    _draw(axes, log, "loss", "training loss", color="tab:blue", alpha=0.6, linewidth=1)
    _draw(axes, log, "eval_loss", "validation loss", color="tab:orange", marker="o")
    lines, labels = axes.get_legend_handles_labels()
    if any("eval_rougeLsum" in entry for entry in log):
        right = axes.twinx()
        right.set_ylabel("ROUGE-L, %")
        _draw(
            right, log, "eval_rougeLsum", "validation ROUGE-L", color="tab:green", marker="s", linestyle="--"
        )
        right.set_ylim(bottom=0)
        more, names = right.get_legend_handles_labels()
        lines, labels = lines + more, labels + names
    if lines:
        axes.legend(lines, labels, loc="best")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _draw(axes: Any, log: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
