"""Attention of sequences that are split over ranks is that of the whole, forward, backward and with dropout."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from led_kernels import LongformerMask
from led_kernels.distributed.halo import routes
from led_kernels.testing import assert_within_error_bound
from tests.distributed import attention_checks
from tests.distributed.processes import result, run_on_ranks

WORLDS = (2, 4)
MASK = LongformerMask.from_lengths([64, 50], 64, global_index=[0, 33])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what each rank has found, by the number of ranks."""
    return {
        world: run_on_ranks(
            world, "tests.distributed.attention_checks.main", tmp_path_factory.mktemp(f"{world}")
        )
        for world in WORLDS
    }


@pytest.mark.parametrize(
    ("world", "check"), [(world, name) for world in WORLDS for name in attention_checks.names(world)]
)
def test_parts_are_the_whole(world, check, found):
    for rank in range(world):
        for name, tensors in result(found[world][rank], check).items():
            assert_within_error_bound(*tensors, f"{name} of rank {rank}")


@pytest.mark.parametrize("window_size", [0, 3, (9, 2), 30, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_query_is_in_one_piece(world, window_size):
    for rank in range(world):
        shard = MASK.shard(rank, world, window_size)
        queries = sorted(piece.queries for piece in (shard.main, *shard.strips))
        assert queries[0][0] == shard.own[0]
        assert queries[-1][1] == shard.own[1]
        assert all(a[1] == b[0] for a, b in pairwise(queries))
        for piece in (shard.main, *shard.strips):
            piece.mask.__class__(*piece.mask.tensors(), piece.mask.max_seqlen)  # which checks the values
            assert (piece.mask.position_offset % 4 == 0).all()


@pytest.mark.parametrize("window_size", [1, (9, 2), 30, 100])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_what_one_rank_sends_the_other_expects(world, window_size):
    shards = [MASK.shard(rank, world, window_size) for rank in range(world)]
    for a in range(world):
        for b in range(world):
            (first, last), (begin, end) = routes(shards[a])[0][b], routes(shards[b])[1][a]
            assert last - first == end - begin


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: MASK.shard(2, 2, 8), "rank is 2 of 2"),
        (lambda: MASK.shard(0, 2, 8, bounds=(0, 30, 64)), "multiples of 4"),
        (lambda: MASK.shard(0, 2, 8, bounds=(0, 32, 60)), "from 0 to 64"),
        (lambda: MASK.shard(0, 2, 8, bounds=(0, 64, 64)), "ascending"),
        (lambda: MASK.shard(0, 20, 8), "cannot be split over 20 ranks"),
        (lambda: LongformerMask.packed([0, 5, 9]).shard(0, 2, 8), "packed"),
    ],
)
def test_a_part_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_a_long_part_waits_with_its_edges_alone():
    """The halo is under way while the main piece is computed, which has all queries whose window does not reach it."""
    shard = LongformerMask.from_lengths([4096], 4096, global_index=[0]).shard(1, 4, 64)
    assert shard.main.queries == (1024 + 64, 2048 - 64)
    assert shard.main.keys == (1024, 2048)
    assert [strip.queries for strip in shard.strips] == [(1024, 1088), (1984, 2048)]


def test_no_copy_is_made_of_a_part_without_global_tokens():
    """Then the rows of a part are the rows of its main piece."""
    shard = LongformerMask.from_lengths([4096], 4096).shard(1, 4, 64)
    assert shard.main.front == 0
    assert shard.main.mask.token_kind.shape == torch.Size([1, 1024])
