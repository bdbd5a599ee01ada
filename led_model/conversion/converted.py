"""Names what a converted checkpoint consists of, and what all conversions share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from led_model.schema import quoted

# These keys of a config.json say where it comes from, or repeat what is known, and are written anew.
PROVENANCE = ("_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version")


@dataclass
class Request:
    """Holds what a caller asks for; ``None`` keeps the source's, or takes the family's default.

    ``max_positions`` and ``max_decoder_positions`` count tokens; ``attention_window`` is the even total width of
    config.json.
    """

    max_positions: int | None = None
    max_decoder_positions: int | None = None
    attention_window: int | None = None


@dataclass
class Reach:
    """Says how many tokens a text may have, and how many of them a token sees.

    Args:
        positions: tokens that a text may have now.
        old_positions: tokens that it might have before.
        windows: the even total width of each layer's band.
        old_windows: what it was before; ``None`` where every token saw all.
    """

    positions: int
    old_positions: int
    windows: list[int]
    old_windows: list[int] | None

    @property
    def exact_length(self) -> int:
        """Returns up to how many tokens a text gives what the source gives."""
        both = min(self.positions, self.old_positions)
        old_windows = self.old_windows or [2 * both] * len(self.windows)
        # A band that has changed gives the same as long as both see the whole text.
        changed = [pair for pair in zip(self.windows, old_windows, strict=True) if pair[0] != pair[1]]
        return min([both, *(min(pair) // 2 + 1 for pair in changed)])


@dataclass
class Converted:
    """Holds a converted checkpoint.

    Args:
        config: the contents of config.json.
        tensors: those of model.safetensors, by their names there; tied ones once.
        notes: a sentence on each thing that the source has and the result has not.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    reach: Reach
    notes: list[str] = field(default_factory=list)


def check_flags(stored: Mapping[str, Any], refused: Mapping[str, tuple[Any, str]], source: object) -> None:
    """Checks that a config.json asks for nothing that the result cannot do.

    Args:
        refused: by the name of a setting, the only value that the result computes with, and what another value means.

    Raises:
        ValueError: with the setting and the reason.
    """
    for name, (served, meaning) in refused.items():
        if stored.get(name, served) != served:
            raise ValueError(
                f"{source} cannot be converted: {name} in its config.json is {quoted(str(stored[name]))}, {meaning}."
            )


def reach_of(
    request: Request, old: int, default_positions: int, layers: int, old_windows: list[int] | None
) -> Reach:
    """Returns how far the result shall reach.

    Without a request, a source without bands (``old_windows`` is ``None``) gets ``default_positions`` at least and
    bands as wide as its ``old`` positions, and one with bands keeps both.
    """
    positions = request.max_positions
    if positions is None:
        positions = old if old_windows is not None else max(old, default_positions)
    windows = [max(2, old // 2 * 2)] * layers if old_windows is None else old_windows
    if request.attention_window is not None:
        windows = [request.attention_window] * layers
    return Reach(positions, old, windows, old_windows)
