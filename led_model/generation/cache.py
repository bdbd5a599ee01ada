"""Defines the decoder's key and value caches, which are allocated once, written in place and never grown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from led_kernels.gemv import write_rows
from led_model.checks import LayerStack
from led_model.config import LEDConfig
from led_model.precision import autocast_dtype
from led_model.schema import check_values, integer

_SIZES = {"batch": integer(0), "max_length": integer(1), "beams": integer(1)}


class StaticKVCache:
    """Holds the keys and values of every decoder self-attention, one of each per target position.

    ``keys`` and ``values`` are ``[layers, batch, heads, capacity, head_dim]``, with a capacity of ``max_length``
    positions. Shapes and addresses never change, and positions are chosen by an index tensor, so a decoding step can be
    compiled once or captured in a graph. Positions not yet written hold zeros (0 weight times NaN would be NaN) and
    :meth:`attention_mask` hides them: it is needed even where a step has one query, or empty positions take part and
    the tokens are wrong. ``heads`` is the number of them here, where a model's are sharded over processes.
    """

    def __init__(
        self,
        config: LEDConfig,
        batch: int,
        max_length: int,
        *,
        heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_values({"batch": batch, "max_length": max_length}, _SIZES)
        head_dim = config.d_model // config.decoder_attention_heads
        shape = (config.decoder_layers, batch, heads or config.decoder_attention_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.arange(max_length, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns all tensors that a step reads or writes, none of which is ever replaced by another."""
        return tuple(value for value in vars(self).values() if isinstance(value, Tensor))

    @property
    def max_length(self) -> int:
        """Returns the number of positions."""
        return self.positions.shape[0]

    def num_positions(self, num_tokens: int) -> int:
        """Returns at how many positions ``num_tokens`` tokens of a step stand."""
        return num_tokens

    def check(self, hidden: Tensor, padding_mask: Tensor | None, decoder: LayerStack) -> None:
        """Checks that the cache and the mask fit the ``decoder`` and its input ``hidden`` ``[batch, target, d_model]``.

        Raises:
            ValueError: naming ``cache`` or ``attention_mask``.
        """
        batch = hidden.shape[0]
        layers, rows, heads, _, head_dim = self.keys.shape
        width = decoder.embed_positions.weight.shape[1]
        if len(decoder.layers):  # whose heads may be sharded over processes
            attention: Any = decoder.layers[0].self_attn
            width = attention.num_heads * attention.head_dim
        wanted = (len(decoder.layers), batch, width)
        if (layers, rows, heads * head_dim) != wanted:
            raise ValueError(
                f"cache has {layers} layers, {rows} rows and width {heads * head_dim}; give one built for "
                f"{wanted[0]} layers, {batch} rows and width {wanted[2]}."
            )
        dtype, device = decoder.embed_positions.weight.dtype, hidden.device
        mixed = autocast_dtype(device) is not None
        if self.keys.device != device or (self.keys.dtype != dtype and not mixed):
            raise ValueError(
                f"cache is {self.keys.dtype} on {self.keys.device}; give one built with dtype={dtype} and "
                f"device={str(device)!r}, as the model is."
            )
        if padding_mask is not None and (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dim() != 2
            or padding_mask.shape[0] != batch
            or padding_mask.shape[1] > self.max_length
            or padding_mask.device != device
        ):
            given = getattr(padding_mask, "shape", type(padding_mask).__name__)
            place = getattr(padding_mask, "device", "no device")
            raise ValueError(
                f"attention_mask is {given} on {place}; give [batch, positions], here [{batch}, at most "
                f"{self.max_length}] on {device}."
            )

    def is_empty_at(self, position: int) -> bool:
        """Returns whether no layer has written anything at ``position``."""
        indices = self.indices_of(self.positions[position : position + 1])
        return bool(len(self.keys)) and not any(
            bool(x.index_select(3, indices).any()) for x in (self.keys, self.values)
        )

    def write(self, layer: int, indices: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``[batch, heads, n, head_dim]`` at :meth:`indices_of` their positions; returns the full buffers."""
        write_rows(self.keys[layer], indices, key)
        write_rows(self.values[layer], indices, value)
        return self.keys[layer], self.values[layer]

    def indices_of(self, position: Tensor) -> Tensor:
        """Returns where in ``keys`` and ``values`` the tokens at ``position`` are written; both are int64 ``[n]``."""
        return position

    def attention_mask(self, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Returns which positions the queries at ``position [n]`` see: those up to themselves that hold no padding.

        Args:
            padding_mask: ``[batch, ≤ max_length]``, nonzero for tokens; positions beyond it hold tokens.

        Returns:
            bool ``[batch or 1, 1, n, max_length]``.
        """
        mask = (self.positions <= position[:, None])[None, None]
        if padding_mask is not None:
            mask = mask & self._present(padding_mask)[:, None, None, :]
        return mask

    def _present(self, padding_mask: Tensor) -> Tensor:
        """Returns which positions hold no padding, bool ``[batch, max_length]``; those past the mask hold none."""
        missing = self.max_length - padding_mask.shape[1]
        return torch.nn.functional.pad(padding_mask != 0, (0, missing), value=True)


class BeamKVCache(StaticKVCache):
    """Holds the keys and values of all beams of a document together, and which beam wrote what each beam has to see.

    ``keys`` and ``values`` are ``[layers, batch, heads, capacity, head_dim]`` with a capacity of
    ``max_length * beams``: what beam ``b`` writes at position ``p`` stays at the index ``p * beams + b``. ``ancestry``,
    int64 ``[batch, beams, max_length]``, says which beam wrote the position in a beam's past. Beams are the queries of
    one attention over all keys of their document, so reordering beams moves ``ancestry`` and nothing else, and
    cross-attention reads the keys and values of a document once for all its beams.
    """

    def __init__(
        self,
        config: LEDConfig,
        batch: int,
        beams: int,
        max_length: int,
        *,
        heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_values({"beams": beams, "max_length": max_length}, _SIZES)
        super().__init__(config, batch, max_length * beams, heads=heads, dtype=dtype, device=device)
        self.positions = torch.arange(max_length, device=device)  # each has one index per beam
        self.beams = torch.arange(beams, device=device)
        self.ancestry = self.beams[:, None].repeat(batch, 1, max_length)

    def num_positions(self, num_tokens: int) -> int:
        """Returns 1, as the tokens of a step are those of the beams at one position."""
        return 1

    def check(self, hidden: Tensor, padding_mask: Tensor | None, decoder: LayerStack) -> None:
        super().check(hidden, padding_mask, decoder)
        if hidden.shape[1] != len(self.beams):
            raise ValueError(
                f"cache has {len(self.beams)} beams and the decoder's input {hidden.shape[1]} tokens a document; give "
                "one token for each beam."
            )

    def indices_of(self, position: Tensor) -> Tensor:
        """Returns where all beams write at ``position``, int64 ``[1]``: int64 ``[beams]``."""
        return position * len(self.beams) + self.beams

    def attention_mask(self, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Returns which indices the beams at ``position [1]`` see: one of each position up to it that is no padding.

        Args:
            padding_mask: as in :meth:`StaticKVCache.attention_mask`, one row per document.

        Returns:
            bool ``[batch, 1, beams, max_length * beams]``.
        """
        past = self.positions <= position
        if padding_mask is not None:
            past = past & self._present(padding_mask)[:, None, :]
        seen = (self.ancestry[..., None] == self.beams) & past[..., None]  # [batch, beams, max_length, beams]
        return seen.flatten(2)[:, None]

    def reorder(self, parents: Tensor, position: Tensor) -> None:
        """Makes beam ``b``, after the step at ``position [1]``, go on from what was beam ``parents[:, b]``.

        ``parents`` is int64 ``[batch, beams]``. Positions not yet written belong to their own beam.
        """
        inherited = self.ancestry.gather(1, parents[..., None].expand_as(self.ancestry))
        self.ancestry.copy_(torch.where(self.positions <= position, inherited, self.beams[:, None]))
