"""The decoder's key and value cache: allocated once, written in place, never grown."""

from __future__ import annotations

import torch
from torch import Tensor

from led_model.config import LEDConfig


class StaticKVCache:
    """Keys and values of every decoder self-attention, one slot per target position.

    ``keys`` and ``values`` are ``[layers, batch, heads, max_length, head_dim]``. Shapes and addresses never
    change, and slots are chosen by an index tensor, so a decoding step can be compiled once or captured in a
    graph. Slots not yet written hold zeros (0 weight times NaN would be NaN) and :meth:`attention_mask` hides
    them: it is needed even where a step has one query, or empty slots take part and the tokens are wrong.
    """

    def __init__(
        self,
        config: LEDConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        heads = config.decoder_attention_heads
        shape = (config.decoder_layers, batch, heads, max_length, config.d_model // heads)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = torch.arange(max_length, device=device)

    @property
    def max_length(self) -> int:
        return self.slots.shape[0]

    def write(self, layer: int, position: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``[batch, heads, n, head_dim]`` at int64 ``position [n]``; returns the full buffers."""
        self.keys[layer].index_copy_(2, position, key)
        self.values[layer].index_copy_(2, position, value)
        return self.keys[layer], self.values[layer]

    def attention_mask(self, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Which slots queries at ``position [n]`` see: those up to themselves that hold no padding.

        ``padding_mask`` is ``[batch, ≤ max_length]``, nonzero for tokens; slots beyond it hold tokens.
        Returns bool ``[batch or 1, 1, n, max_length]``.
        """
        mask = (self.slots <= position[:, None])[None, None]
        if padding_mask is not None:
            missing = self.max_length - padding_mask.shape[1]
            present = torch.nn.functional.pad(padding_mask != 0, (0, missing), value=True)
            mask = mask & present[:, None, None, :]
        return mask
