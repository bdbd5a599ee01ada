"""Lets a decoder attend to documents whose keys stay on the ranks that have made them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from led_kernels.api import global_attention
from led_kernels.arguments import draw_seed
from led_kernels.distributed.collectives import merge_over_ranks
from led_kernels.distributed.context import even_part, from_first_rank
from led_kernels.eager import never_compiled
from led_kernels.mask import LongformerMask
from led_kernels.mask_tensors import build_tensors
from led_kernels.philox import KEYS_PER_DRAW


@dataclass(frozen=True, eq=False)
class SplitKeys:
    """Says which of a rank's rows are keys, of documents that are split over the ranks of ``group``.

    Attributes:
        is_key: bool ``[batch, rows]``.
    """

    is_key: Tensor
    group: dist.ProcessGroup
    _masks: dict[int, LongformerMask] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_part(cls, attention_mask: Tensor | None, states: Tensor, group: dist.ProcessGroup) -> SplitKeys:
        """Returns the keys that a rank has.

        Args:
            attention_mask: of the whole documents, ``[batch, source]``, nonzero for tokens; default: all are.
            states: the encoder's output for the own rows, ``[batch, rows, d_model]``.

        Raises:
            ValueError: for a mask of another length.
        """
        if attention_mask is None:
            return cls(states.new_ones(states.shape[:2], dtype=torch.bool), group)
        own = attention_mask[:, even_part(attention_mask.shape[1], group)] != 0
        if own.shape[1] != states.shape[1]:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, of which {own.shape[1]} are this rank's, and "
                f"the encoder's output has {states.shape[1]} rows here; give the mask of the whole documents."
            )
        return cls(own, group)

    @never_compiled
    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Returns attention over the keys of all ranks, ``[batch, heads, queries, head_dim]``.

        Each rank attends to its own keys, and the results are merged by their lse.

        Args:
            q: ``[batch, heads, queries, head_dim]``, the same on all ranks.
            k, v: ``[batch, heads, rows, head_dim]``, the own rows.
        """
        seed = draw_seed(dropout_p, q.device)
        if seed is not None:
            seed = from_first_rank(seed, self.group)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # Every query sees every key, as global tokens do.
        out, lse = global_attention(
            q.contiguous(), k, v, self._mask(q.shape[1]), dropout_p=dropout_p, seed=seed, return_lse=True
        )
        return merge_over_ranks(out, lse, self.group).transpose(1, 2)

    def _mask(self, queries: int) -> LongformerMask:
        if queries not in self._masks:
            batch, rows = self.is_key.shape
            device = self.is_key.device
            seq_len = torch.where(self.is_key, torch.arange(1, rows + 1, device=device), 0).amax(1)
            query = torch.arange(queries, device=device).repeat(batch, 1)
            # Dropout draws by positions, which have to differ between ranks.
            offset = dist.get_rank(self.group) * (
                2**31 // dist.get_world_size(self.group) // KEYS_PER_DRAW * KEYS_PER_DRAW
            )
            tensors = build_tensors(
                self.is_key,
                torch.zeros_like(seq_len),
                seq_len,
                torch.full_like(query, -1),
                torch.full_like(seq_len, queries),
                queries,
                position_offset=offset,
                global_position=query,
            )
            self._masks[queries] = LongformerMask.from_tensors(tensors, rows)
        return self._masks[queries]
