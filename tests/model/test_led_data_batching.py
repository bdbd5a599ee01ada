"""Which documents form a batch: all of them once, by length or by tokens, and equally many batches for every rank."""

from __future__ import annotations

import statistics
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from led_model import LEDDataCollator, LEDTokenizer, LengthBatchSampler, TokenBatchSampler

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def lengths_like_papers(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count).log_normal_(8, 0.5, generator=generator).clamp(100, 16384).int().tolist()


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Returns the rows of padded batches by the tokens in them."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return padded / sum(lengths)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_document_is_in_one_batch_of_one_rank(lengths, batch_size, ranks, epoch):
    samplers = {
        LengthBatchSampler: {"batch_size": batch_size},
        TokenBatchSampler: {"max_tokens": 50 * batch_size + 50},
    }
    for sampler_class, limit in samplers.items():
        whole = sampler_class(lengths, **limit, num_replicas=ranks)
        whole.set_epoch(epoch)
        batches = list(whole)
        assert len(batches) == len(whole)
        assert len(batches) % ranks == 0
        assert all(batches)
        of_ranks = []
        for rank in range(ranks):
            own = sampler_class(lengths, **limit, num_replicas=ranks, rank=rank)
            own.set_epoch(epoch)
            of_ranks.append(list(own))
            assert len(of_ranks[-1]) == len(own)
        assert [batch for step in zip(*of_ranks, strict=True) for batch in step] == batches
        if sampler_class is LengthBatchSampler:
            assert max(map(len, batches)) <= batch_size
        else:
            assert max(sum(lengths[i] for i in batch) for batch in batches) <= limit["max_tokens"]
        seen = sorted(document for batch in batches for document in batch)
        assert set(seen) == set(range(len(lengths)))
        if max(map(len, batches)) > 1:  # else only repetition makes batches a multiple of the ranks
            assert seen == sorted(set(seen))


@pytest.mark.parametrize("batch_size", [2, 4])
def test_documents_are_repeated_only_where_there_is_no_other_way(batch_size):
    for documents in range(1, 40):
        for ranks in range(1, 5):
            batches = list(LengthBatchSampler([7] * documents, batch_size, num_replicas=ranks))
            if documents >= 2 * ranks:
                assert sum(map(len, batches)) == documents
    assert sum(map(len, LengthBatchSampler([7] * 3, 1, num_replicas=2))) == 4
    assert sum(map(len, TokenBatchSampler([7] * 3, 7, num_replicas=2))) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [partial(LengthBatchSampler, batch_size=4), partial(TokenBatchSampler, max_tokens=16384)],
    ids=["length", "tokens"],
)
def test_accelerate_deals_out_every_document_once(make, ranks):
    """It wraps the sampler for each rank, and tells it the epoch."""
    prepare = pytest.importorskip("accelerate").data_loader.prepare_data_loader
    lengths = lengths_like_papers(101)
    documents = [{"input_ids": [i]} for i in range(len(lengths))]

    def dealt(rank: int) -> list[list[list[int]]]:
        """Returns the batches of two epochs."""
        loader = DataLoader(documents, batch_sampler=make(lengths, num_replicas=ranks), collate_fn=list)
        loader = prepare(loader, num_processes=ranks, process_index=rank)
        return [[[row["input_ids"][0] for row in batch] for batch in loader] for _ in range(2)]

    of_ranks = [dealt(rank) for rank in range(ranks)]
    orders = []
    for epoch in range(2):
        assert len({len(epochs[epoch]) for epochs in of_ranks}) == 1
        expected = make(lengths, num_replicas=ranks)
        expected.set_epoch(epoch)
        steps = zip(*(epochs[epoch] for epochs in of_ranks), strict=True)
        orders.append([batch for step in steps for batch in step])
        assert orders[-1] == list(expected)
        assert sorted(i for batch in orders[-1] for i in batch) == list(range(len(lengths)))
    assert orders[0] != orders[1]


def test_seed_and_epoch_choose_the_order():
    lengths = lengths_like_papers(200)
    for sampler_class, limit in ((LengthBatchSampler, 4), (TokenBatchSampler, 32768)):
        first, same, other = (sampler_class(lengths, limit, seed=seed) for seed in (1, 1, 2))
        assert list(first) == list(same) == list(first)
        assert list(first) != list(other)
        before = list(first)
        first.set_epoch(1)
        assert list(first) != before
        companions = [{frozenset(batch) for batch in batches} for batches in (before, first)]
        assert len(companions[0] & companions[1]) < 0.5 * len(before)
        assert len(list(first)) == len(first) == len(before)


def test_grouping_by_length_saves_padding():
    lengths = lengths_like_papers(1000)
    random = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).split(4)
    assert padding([batch.tolist() for batch in random], lengths) > 1.4
    batches = list(LengthBatchSampler(lengths, 4))
    assert padding(batches, lengths) < 1.05
    assert lengths.index(max(lengths)) in batches[0]
    firsts = [lengths[batch[0]] for batch in batches]
    assert statistics.correlation(firsts, list(range(len(firsts)))) > -0.2  # lengths come in any order


def test_the_ranks_of_a_step_have_documents_alike():
    lengths = lengths_like_papers(1000)
    batches = iter(LengthBatchSampler(lengths, 2, num_replicas=4))
    steps = [list(islice(batches, 4)) for _ in range(125)]
    assert padding([sum(step, []) for step in steps], lengths) < 1.1  # noqa: RUF017


def test_batches_are_filled():
    lengths = lengths_like_papers(1000)
    for max_tokens in (16384, 65536):
        batches = list(TokenBatchSampler(lengths, max_tokens))
        assert sum(lengths) / (len(batches) * max_tokens) > 0.94
    one_long = [16384, *[160] * 100]
    assert len(TokenBatchSampler(one_long, 16384)) == 2


def test_a_large_data_set_is_sampled_at_once():
    """A quadratic search would take minutes."""
    sampler = TokenBatchSampler(lengths_like_papers(30_000), 32768)
    assert sum(map(len, sampler)) == 30_000


def test_packed_batches_of_a_loader(tokenizer_files):
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    rows = [dict(tokenizer("text " * count, text_target="text")) for count in (3, 30, 5, 17, 9, 21)]
    lengths = [len(row["input_ids"]) for row in rows]
    max_tokens = max(lengths) + 10
    loader = DataLoader(
        rows,
        batch_sampler=TokenBatchSampler(lengths, max_tokens),
        collate_fn=LEDDataCollator(tokenizer, packing=True),
    )
    batches = list(loader)
    assert max(len(batch["input_ids"]) for batch in batches) <= max_tokens
    assert sum(len(batch["input_ids"]) for batch in batches) == sum(lengths)
    assert sum(len(batch["cu_seqlens"]) - 1 for batch in batches) == len(rows)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TokenBatchSampler([5, 20], 10), "document 1 has 20 tokens, more than max_tokens 10"),
        (lambda: TokenBatchSampler([5], 0), "max_tokens is 0"),
        (lambda: LengthBatchSampler([5], 0), "batch_size is 0"),
        (lambda: LengthBatchSampler([], 2), "lengths is empty"),
        (lambda: LengthBatchSampler([5, 0], 2), "lengths holds 0"),
        (lambda: LengthBatchSampler([5, 2.5], 2), "lengths holds 2.5"),
        (lambda: LengthBatchSampler([5], 2, seed=-1), "seed is -1"),
        (lambda: LengthBatchSampler([5], 2, num_replicas=0), "num_replicas is 0"),
        (lambda: LengthBatchSampler([5], 2, num_replicas=2, rank=2), "rank is 2"),
    ],
)
def test_refused_settings(call, said):
    with pytest.raises(ValueError, match=said):
        call()
