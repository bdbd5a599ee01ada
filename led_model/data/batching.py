"""Chooses which documents form a batch, by their lengths, so that ranks get equally many batches of all documents."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator
from torch.utils.data import Sampler

from led_model.schema import check_values, integer

_SORTED_STEPS = 50  # so many steps are sorted by length at once; more would make epochs alike
_ALIKE = 15 / 16  # of the longer one's length, and documents are exchanged freely


class _BatchSampler(Sampler[list[int]]):
    """Yields the documents of each batch; a subclass says which, in ``_batches``.

    With ``rank``, it yields that rank's batches. Without one it yields those of all ranks, ``num_replicas`` batches a
    step, which accelerate and transformers' Trainer deal out.
    """

    def __init__(self, lengths: Any, seed: int, num_replicas: int | None, rank: int | None) -> None:
        if num_replicas is None:
            is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            num_replicas = torch.distributed.get_world_size() if is_distributed else 1
        check_values(
            {"seed": seed, "num_replicas": num_replicas}, {"seed": integer(0), "num_replicas": integer(1)}
        )
        check_values({"rank": rank}, {"rank": integer(0, num_replicas - 1).optional})
        self.lengths = _checked_lengths(lengths)
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0

    @property
    def sampler(self) -> _BatchSampler:
        """Returns itself: accelerate looks here for whom it tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets which of the orders follows; accelerate and Trainer call it, a plain loop has to."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches, the same in every epoch."""
        return self._count() // (1 if self.rank is None else self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(Generator().manual_seed(self.seed + self.epoch))
        return iter(batches if self.rank is None else batches[self.rank :: self.num_replicas])

    def _count(self) -> int:
        """Returns the number of batches of all ranks, a multiple of ``num_replicas``."""
        raise NotImplementedError

    def _batches(self, generator: Generator) -> list[list[int]]:
        """Returns the batches of all ranks, step by step."""
        raise NotImplementedError


class LengthBatchSampler(_BatchSampler):
    """Groups documents of similar length into batches of at most ``batch_size``, which need little padding.

    >>> sampler = LengthBatchSampler([len(row["input_ids"]) for row in features], batch_size=4)
    >>> loader = torch.utils.data.DataLoader(features, batch_sampler=sampler, collate_fn=collate)

    Every document is in one batch of an epoch, the batches of one step are alike on all ranks, and the longest
    document comes first, so that too little memory shows at once. Only where the documents cannot be dealt out evenly
    in batches of ``batch_size``, as 3 of them on 2 ranks in batches of 1, are some repeated.

    transformers' Trainer groups by length itself, with led_model's models as with its own: by
    ``TrainingArguments(train_sampling_strategy="group_by_length")``, before transformers 5 ``group_by_length=True``,
    with the tokenizer as ``processing_class``. It tells lengths by ``input_ids``, or by a column ``length`` of a
    ``datasets.Dataset``. To use this class there, return from ``get_train_dataloader`` of a subclass
    ``self.accelerator.prepare(loader)``.

    Args:
        lengths: tokens of each document, ints ``[documents]``.
        batch_size: of one rank.
        seed: with the epoch it chooses the order.
        num_replicas: ranks that share the documents; default: those of ``torch.distributed``, if it is initialized.
        rank: whose batches are yielded; default: those of all ranks, for accelerate and Trainer to deal out.

    Raises:
        ValueError: for settings that are not as above.
    """

    def __init__(
        self,
        lengths: Any,
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(lengths, seed, num_replicas, rank)
        check_values({"batch_size": batch_size}, {"batch_size": integer(1)})
        # Not batch_size: accelerate takes this for the size of every batch.
        self.documents_per_batch = batch_size

    def _count(self) -> int:
        return -(-len(self.lengths) // (self.documents_per_batch * self.num_replicas)) * self.num_replicas

    def _batches(self, generator: Generator) -> list[list[int]]:
        count, documents = self._count(), len(self.lengths)
        order = torch.randperm(documents, generator=generator).tolist()
        order += [order[i % documents] for i in range(count - documents)]
        steps = count // self.num_replicas
        sorted_steps = max(1, min(_SORTED_STEPS, steps // 4))
        span = -(-len(order) // steps) * sorted_steps
        order = [
            document
            for start in range(0, len(order), span)
            for document in sorted(order[start : start + span], key=self.lengths.__getitem__, reverse=True)
        ]
        batches = [part.tolist() for part in torch.tensor(order).tensor_split(count)]
        longest = max(order, key=self.lengths.__getitem__)
        first = next(i for i, batch in enumerate(batches) if longest in batch) // self.num_replicas
        others = [step for step in torch.randperm(steps, generator=generator).tolist() if step != first]
        return [
            batch
            for step in (first, *others)
            for batch in batches[step * self.num_replicas : (step + 1) * self.num_replicas]
        ]


class TokenBatchSampler(_BatchSampler):
    """Fills batches up to ``max_tokens``, for a collator that packs them: all have about as many tokens.

    >>> lengths = [min(len(row["input_ids"]), 16384) for row in features]
    >>> sampler = TokenBatchSampler(lengths, max_tokens=32768)
    >>> collate = LEDDataCollator(tokenizer, max_length=16384, packing=True)
    >>> loader = torch.utils.data.DataLoader(features, batch_sampler=sampler, collate_fn=collate)

    Every document is in one batch of an epoch, the number of batches is the same in every epoch, and a multiple of
    ``num_replicas``; only where fewer documents are left than would make it one, are batches repeated. In
    transformers' Trainer, return ``self.accelerator.prepare(loader)`` from ``get_train_dataloader`` of a subclass.

    Documents are placed by decreasing length where they leave least room, best-fit decreasing. What shares a batch
    changes from epoch to epoch: documents whose lengths are alike change places.

    Args:
        lengths: tokens of each document as the collator cuts it, ints ``[documents]``; labels may be counted in.
        max_tokens: of one batch of one rank.
        seed, num_replicas, rank: see :class:`LengthBatchSampler`.

    Raises:
        ValueError: for settings that are not as above, and a document of more than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: Any,
        max_tokens: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(lengths, seed, num_replicas, rank)
        check_values({"max_tokens": max_tokens}, {"max_tokens": integer(1)})
        longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        if self.lengths[longest] > max_tokens:
            raise ValueError(
                f"document {longest} has {self.lengths[longest]:,} tokens, more than max_tokens {max_tokens:,}; cut "
                "the documents, or raise it."
            )
        self.max_tokens = max_tokens
        self._alike = _alike(self.lengths)
        sizes = [
            (self.lengths[documents[0]], kind)
            for kind, documents in enumerate(self._alike)
            for _ in documents
        ]
        self._places = _split_to_multiple(_best_fit(sizes, max_tokens), self.num_replicas)
        """For every batch the kinds of its documents, as indices of ``_alike``."""

    def _count(self) -> int:
        return -(-len(self._places) // self.num_replicas) * self.num_replicas

    def _batches(self, generator: Generator) -> list[list[int]]:
        waiting = [
            [documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()]
            for documents in self._alike
        ]
        batches = [[waiting[kind].pop() for kind in kinds] for kinds in self._places]
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return [batches[i % len(batches)] for i in range(self._count())]


def _checked_lengths(lengths: Any) -> list[int]:
    values = lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)
    is_length = integer(1).accepts
    wrong = next((value for value in values if not is_length(value)), None)
    if wrong is not None or not values:
        told = "is empty" if wrong is None else f"holds {wrong!r}"
        raise ValueError(f"lengths {told}; give the number of tokens of each document, 1 or more.")
    return values


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Returns the documents in groups of similar length, the longest group and in it the longest document first."""
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if groups and lengths[document] >= _ALIKE * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


def _best_fit(sizes: Sequence[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Returns bins of the kinds of things ``(size, kind)``, which come by decreasing size."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each bin, ascending, with its index
    for size, kind in sizes:
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, index = room.pop(at)
        else:
            left, index = capacity, len(bins)
            bins.append([])
        bins[index].append(kind)
        insort(room, (left - size, index))
    return bins


def _split_to_multiple(bins: list[list[int]], multiple: int) -> list[list[int]]:
    """Returns the bins, of which those with the most things are halved until their number is a multiple."""
    bins = sorted(bins, key=len)
    while len(bins) % multiple and len(bins[-1]) > 1:
        largest = bins.pop()
        for half in (largest[::2], largest[1::2]):
            insort(bins, half, key=len)
    return bins
