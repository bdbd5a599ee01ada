"""The mask of a batch says which rows are padding, local or global; it is built once per forward for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from led_kernels.argument_checks import as_integers, check_marks, check_size, whole_numbers, window_of
from led_kernels.mask_checks import (
    capacity_for,
    check_ascending,
    check_capacity,
    check_index,
    check_rank,
    check_structure,
    check_values,
    debug_assert,
    global_index_of,
    is_checkable,
    largest,
    read_values,
)
from led_kernels.mask_shard import MaskShard, check_bounds, even_bounds, shard_mask
from led_kernels.mask_tensors import (
    GLOBAL,
    LOCAL,
    PADDING,
    MaskTensors,
    as_global_index,
    build_tensors,
    sort_unique,
)


@dataclass(frozen=True, eq=False)
class LongformerMask:
    """Says which rows exist, and which of them are global, for a padded batch or for packed sequences.

    Row ``i`` of sequence ``b`` is row ``seq_start[b] + i`` of a ``[total_rows, heads, head_dim]`` tensor when the
    mask is packed, and row ``i`` of batch entry ``b`` (``seq_start`` is 0) when it is padded. All positions below
    are relative to their sequence.

    Attributes:
        seq_start: int32 ``[batch]``, first row of each sequence.
        seq_len: int32 ``[batch]``, 1 + the last position that is not padding; 0 for a row of only padding.
        token_kind: uint8 ``[batch, seqlen]`` or ``[total_rows]``; 0 padding, 1 local, 2 global, 3 halo: a key as a
            local token is, and no query of banded attention, as another piece of the sequence computes its row.
        padding_before: int32, same shape; how many positions before this one, in its sequence, are padding. A tile
            ``[a, b)`` is free of padding when ``padding_before`` does not grow over it.
        global_index: int32 ``[batch, max_globals]``, positions of the global tokens, ascending, filled with -1.
        num_globals: int32 ``[batch]``.
        position_offset: int32 ``[batch]``, multiples of 4 that may be negative: row ``i`` stands at position
            ``i + position_offset[b]`` of the whole sequence, of which the rows may be a piece. Only dropout looks at
            it, so that the pieces drop what the whole sequence would. Local and halo rows stand at 0 or later; the row
            of a global token that no local one has in its window may be anywhere.
        global_position: int32 ``[batch, max_globals]``, positions of the global tokens in the whole sequence, in the
            order of ``global_index``, filled with -1; for dropout too. A global token that a local one has in its
            window stands where its row does, at ``global_index + position_offset``.
        max_seqlen: the longest sequence that the shapes admit.

    Its tensors are not to be changed in place: values are checked when it is built, and only some backends look again.

    Build one with :meth:`from_padding`, :meth:`from_lengths` or :meth:`packed`. Each does at most one
    device-to-host sync, which also fetches whether the values are right. ``max_globals=`` fixes the capacity of
    ``global_index``: then shapes depend on it alone, and nothing is synced. In that case values are checked on the CPU,
    unless a program is compiled or traced; on a GPU more global tokens than it holds are the caller's error
    (``LED_KERNELS_DEBUG=1`` checks the values by a device assert).

    Raises:
        TypeError, ValueError: for tensors that are not as above; for their values on the CPU only.
    """

    seq_start: Tensor
    seq_len: Tensor
    token_kind: Tensor
    padding_before: Tensor
    global_index: Tensor
    num_globals: Tensor
    position_offset: Tensor
    global_position: Tensor
    max_seqlen: int

    are_values_checked: InitVar[bool] = False  # by the caller; shapes and dtypes are compared all the same

    def __post_init__(self, are_values_checked: bool) -> None:
        if torch.compiler.is_compiling():
            return
        tensors = self.tensors()
        check_structure(tensors, self.max_seqlen)
        if not are_values_checked and is_checkable(*tensors):
            check_values(tensors, self.max_seqlen)

    def tensors(self) -> MaskTensors:
        """Returns all fields but ``max_seqlen``, with their names."""
        return MaskTensors(
            self.seq_start, self.seq_len, self.token_kind, self.padding_before, self.global_index, self.num_globals,
            self.position_offset, self.global_position,
        )  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: MaskTensors, max_seqlen: int) -> LongformerMask:
        """Builds a mask of what :meth:`tensors` returns; their values are taken as checked.

        For global attention alone ``global_index`` may hold anything, such as -1 for tokens that lie in another piece
        of the sequence. Banded attention reads the rows that it points to, and only some backends look whether they
        exist.

        Raises:
            TypeError, ValueError: for other dtypes, shapes, strides or devices.
        """
        return cls(*tensors, max_seqlen, are_values_checked=True)

    @property
    def is_packed(self) -> bool:
        return self.token_kind.dim() == 1

    @property
    def batch(self) -> int:
        return self.seq_len.shape[0]

    @property
    def max_globals(self) -> int:
        return self.global_index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.token_kind.device

    def to(self, device: torch.device | str) -> LongformerMask:
        """Returns the same mask on another device."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device is {device}; a mask has dtypes of its own, give a device.")
        return self.from_tensors(MaskTensors(*(x.to(device) for x in self.tensors())), self.max_seqlen)

    def shard(
        self,
        rank: int,
        world: int,
        window_size: int | tuple[int, int],
        *,
        bounds: tuple[int, ...] | None = None,
    ) -> MaskShard[LongformerMask]:
        """Returns the part of one rank of sequences that are split over ``world`` ranks.

        Args:
            window_size: ``w`` or ``(left, right)``, as in :func:`led_kernels.banded_attention`.
            bounds: where the ranks' parts begin, multiples of 4, and the end; default: even parts.

        Raises:
            TypeError, ValueError: naming the argument and the remedy.
        """
        if self.is_packed:
            raise ValueError(
                "a packed mask is not split over ranks; pad the sequences, or deal them to the ranks."
            )
        if bounds is None:
            bounds = even_bounds(self.max_seqlen, world)
        check_bounds(bounds, world, self.max_seqlen)
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; give 0 … {world - 1}.")
        window = window_of(window_size, self.max_seqlen)
        return shard_mask(self.tensors(), rank, bounds, window, self.from_tensors)

    @classmethod
    def from_padding(
        cls,
        attention_mask: Tensor,
        global_attention_mask: Tensor | None = None,
        max_globals: int | None = None,
    ) -> LongformerMask:
        """Builds the mask of a padded batch from the masks that Hugging Face models take.

        Args:
            attention_mask: bool, integer or float ``[batch, seqlen]``; 0 padding, 1 token (any pattern: holes and
                left padding too). 2 marks a global token, the merged form of Longformer.
            global_attention_mask: ``[batch, seqlen]``; 1 marks a global token, -1 (the tokenizer's padding value)
                padding. Padding in ``attention_mask`` wins.
            max_globals: capacity of ``global_index``; default: the largest count in the batch.

        Raises:
            TypeError: for something that is no tensor of real numbers.
            ValueError: for another shape, a device mismatch, or a value other than those above.
        """
        check_marks(attention_mask, "attention_mask")
        check_rank(attention_mask, "attention_mask", 2, "[batch, seqlen]")
        check_capacity(max_globals)
        merged, valid = whole_numbers(attention_mask, PADDING, GLOBAL)
        if global_attention_mask is not None:
            check_marks(global_attention_mask, "global_attention_mask")
            if global_attention_mask.shape != attention_mask.shape:
                raise ValueError(
                    f"global_attention_mask has shape {tuple(global_attention_mask.shape)}; "
                    f"give it attention_mask's, {tuple(attention_mask.shape)}."
                )
            if global_attention_mask.device != attention_mask.device:
                raise ValueError(
                    f"global_attention_mask is on {global_attention_mask.device} and attention_mask on "
                    f"{attention_mask.device}; move both to one device."
                )
            marks, marks_valid = whole_numbers(global_attention_mask, -1, 1)
            merged = merged * (marks + 1)
            valid = valid & marks_valid & (merged <= GLOBAL).all()
        _, seqlen = merged.shape
        position = torch.arange(seqlen, device=merged.device)
        seq_len = torch.where(merged != PADDING, position + 1, 0).amax(dim=1)
        positions = torch.where(merged == GLOBAL, position, seqlen).sort(dim=1).values  # [batch, seqlen]
        counts = (merged == GLOBAL).sum(dim=1)
        if max_globals is None or is_checkable(merged):
            valid, most = (int(x) for x in read_values(valid, largest(counts)))
            if not valid:
                raise ValueError(
                    "attention_mask holds a value other than 0 (padding), 1 (token) and 2 (global) after merging with "
                    "global_attention_mask (1 global, 0 local, -1 padding); use these values only."
                )
            max_globals = capacity_for(most, max_globals)
        else:
            debug_assert(
                valid & (counts <= max_globals).all(),
                "mask value out of range or more globals than max_globals",
            )
        seq_start = torch.zeros_like(seq_len)
        return cls.from_tensors(
            build_tensors(merged, seq_start, seq_len, positions, counts, max_globals), seqlen
        )

    @classmethod
    def from_lengths(
        cls,
        lengths: Tensor | Sequence[int],
        seqlen: int,
        global_index: Tensor | Sequence | None = None,
        max_globals: int | None = None,
    ) -> LongformerMask:
        """Builds the mask of a batch that is padded on the right, from its lengths.

        Args:
            lengths: int ``[batch]``, each in 0 … seqlen.
            seqlen: padded length of the batch.
            global_index: int ``[batch, n]`` positions of global tokens in any order, -1 where there is none; or
                ``[n]``, the same for every sequence.
            max_globals: capacity; default: n. Giving it skips the value checks and their sync on a GPU.

        Raises:
            ValueError: for a length outside 0 … seqlen or a global position outside its sequence.
        """
        check_size(seqlen, "seqlen")
        if seqlen < 1:
            raise ValueError(f"seqlen is {seqlen}; give a padded length of at least 1.")
        check_capacity(max_globals)
        lengths = as_integers(lengths, "lengths")
        check_rank(lengths, "lengths", 1, "[batch]")
        index = as_global_index(global_index, lengths.shape[0], lengths.device)
        index_ok = ((index >= -1) & (index < lengths[:, None])).all()
        lengths_ok = ((lengths >= 0) & (lengths <= seqlen)).all()
        positions, counts = sort_unique(index, lengths, seqlen)
        if max_globals is None or is_checkable(lengths):
            lengths_valid, index_valid, most = read_values(lengths_ok, index_ok, largest(counts))
            if not lengths_valid:
                raise ValueError(f"lengths holds a value outside 0 … {seqlen}; clip it or raise seqlen.")
            check_index(index_valid)
            max_globals = capacity_for(most, max_globals, at_least=positions.shape[1])
        else:
            debug_assert(lengths_ok & index_ok, "lengths or global_index out of range")
        position = torch.arange(seqlen, device=lengths.device)
        kind = torch.where(position < lengths[:, None], LOCAL, PADDING)  # int64 [batch, seqlen]
        # Column `seqlen` takes what is no position, and is cut off.
        marks = torch.zeros(kind.shape[0], seqlen + 1, dtype=torch.int64, device=kind.device)
        kind = kind + marks.scatter(1, positions.clamp(max=seqlen), 1)[:, :seqlen]
        seq_start = torch.zeros_like(lengths)
        return cls.from_tensors(
            build_tensors(kind, seq_start, lengths, positions, counts, max_globals), seqlen
        )

    @classmethod
    def packed(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        global_index: Tensor | Sequence | None = None,
        max_globals: int | None = None,
        total_rows: int | None = None,
        max_seqlen: int | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> LongformerMask:
        """Builds the mask of sequences packed one after another without padding; they never see each other.

        Args:
            cu_seqlens: int ``[batch + 1]``, 0 and then the running total of the lengths, as in flash-attention.
            global_index: as in :meth:`from_lengths`, relative to each sequence.
            max_globals: capacity; default: the columns of ``global_index``. Giving it, with ``total_rows``, skips
                the value checks and their sync on a GPU.
            total_rows: ``cu_seqlens[-1]``, if known on the host.
            max_seqlen: the longest sequence, if known on the host; default: measured, or ``total_rows`` when
                nothing is synced.
            global_attention_mask: ``[total_rows]``, 1 marks a global token; in place of ``global_index``. It costs
                three more syncs.

        Raises:
            ValueError: when cu_seqlens does not start at 0 or does not ascend, or a global position lies outside
                its sequence.
        """
        check_capacity(max_globals)
        for name, size in (("total_rows", total_rows), ("max_seqlen", max_seqlen)):
            if size is not None:
                check_size(size, name)
        cu_seqlens = as_integers(cu_seqlens, "cu_seqlens")
        check_rank(cu_seqlens, "cu_seqlens", 1, "[batch + 1]")
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens is empty; give 0 followed by the running total of the lengths.")
        if global_attention_mask is not None:
            global_index = global_index_of(global_attention_mask, global_index, cu_seqlens)
        seq_start, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        index = as_global_index(global_index, lengths.shape[0], lengths.device)
        ascending = (cu_seqlens[0] == 0) & (lengths >= 0).all()
        index_ok = ((index >= -1) & (index < lengths[:, None])).all()
        positions, counts = sort_unique(index, lengths)
        if max_globals is None or total_rows is None or is_checkable(cu_seqlens):
            is_ascending, is_index, total, longest, most = read_values(
                ascending, index_ok, cu_seqlens[-1], largest(lengths), largest(counts)
            )
            check_ascending(is_ascending)
            check_index(is_index)
            if total_rows is not None and total_rows != total:
                raise ValueError(
                    f"total_rows is {total_rows} but cu_seqlens ends at {total}; give the latter."
                )
            if max_seqlen is not None and max_seqlen < longest:
                raise ValueError(
                    f"max_seqlen is {max_seqlen} but a sequence has {longest} rows; give that many at least."
                )
            if max_seqlen is None:  # With both known, shapes must not depend on the lengths.
                max_seqlen = longest if total_rows is None or max_globals is None else total_rows
            total_rows = total
            max_globals = capacity_for(most, max_globals, at_least=positions.shape[1])
        else:
            debug_assert(ascending & index_ok, "cu_seqlens not ascending or global_index out of range")
            max_seqlen = total_rows if max_seqlen is None else max_seqlen
        rows = torch.where(positions < lengths[:, None], positions + seq_start[:, None], total_rows)
        marks = torch.zeros(total_rows + 1, dtype=torch.int64, device=rows.device)
        kind = marks.scatter(0, rows.flatten(), 1)[:total_rows] + 1
        return cls.from_tensors(
            build_tensors(kind, seq_start, lengths, positions, counts, max_globals), max_seqlen
        )
