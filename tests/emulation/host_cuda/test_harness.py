"""Tests of the harness: each thing it emulates against numpy or torch, each broken rule reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulation.host_cuda.toys import ToyFailure, run_toy

SCHEDULES = ("greedy", "reversed", "lockstep")
NOTHING = np.zeros(4, np.int32)


@pytest.fixture(autouse=True, params=SCHEDULES)
def schedule(request, monkeypatch):
    monkeypatch.setenv("LED_HOST_CUDA_SCHEDULE", request.param)
    return request.param


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def aligned(x: np.ndarray) -> np.ndarray:
    """Returns a copy whose address is a multiple of 16."""
    buffer = np.empty(x.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def sixteen_bit(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Returns rounded numbers as bit patterns."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def test_indices_of_threads_and_blocks():
    out = run_toy("indices", NOTHING, np.zeros((8, 8, 6), np.uint32), grid=(3, 2, 4), block=(8, 8, 1))
    y, x = np.indices((8, 8))
    assert np.array_equal(out[..., 0], x)
    assert np.array_equal(out[..., 1], y)
    assert (out[..., 2:] == (2, 1, 3, 2)).all()


@pytest.mark.parametrize("distance", [1, 2, 16, 31])
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("int64", np.int64)])
def test_shuffles(name, dtype, distance):
    given = (1e9 * random(32)).astype(dtype)
    out = run_toy(f"shuffle_{name}", given, np.zeros((2, 32), dtype), option=distance)
    lanes = np.arange(32)
    assert np.array_equal(out[0], given[lanes // 4 * 4])
    assert np.array_equal(out[1], given[lanes ^ distance])


@pytest.mark.parametrize(
    "predicates", [np.zeros(32), np.ones(32), np.arange(32) % 3 == 1], ids=["none", "all", "some"]
)
def test_votes(predicates):
    out = run_toy("votes", predicates.astype(np.int32), np.zeros((3, 32), np.uint32))
    ballot = sum(1 << lane for lane in range(32) if predicates[lane])
    assert ((ballot, predicates.any(), predicates.all()) == out.T).all()


@pytest.mark.parametrize("voter", [None, 0, 77])
def test_votes_of_a_block(voter):
    given = np.zeros(128, np.int32)
    if voter is not None:
        given[voter] = 5
    out = run_toy("block_votes", given, np.full(128, -1, np.int32), block=(128, 1, 1))
    assert ((out != 0) == (voter is not None)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_product(dtype):
    a, b, d = random(16, 16), random(16, 8) * 1e-4, random(16, 8)
    given = np.concatenate([sixteen_bit(a, dtype).ravel(), sixteen_bit(b, dtype).ravel()])
    out = run_toy("product_" + ("half" if dtype == torch.float16 else "bfloat16"), given, d.copy())
    a, b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    np.testing.assert_allclose(out, d + a @ b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(transposed):
    given = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = run_toy("matrices", given, np.zeros((4, 32), np.uint32), option=int(transposed), shared_bytes=512)
    expected = given.transpose(0, 2, 1) if transposed else given
    assert np.array_equal(out.view(np.uint16).reshape(4, 8, 8), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_conversions(dtype):
    """Every 16-bit pattern widened, moved by half a unit in the last place, and by a little more or less."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float().numpy()
    bits = np.concatenate([every.view(np.uint32) + step for step in (0, 1, 2**32 - 1)])
    halfway = 0x1000 if dtype == torch.float16 else 0x8000
    x = np.concatenate([bits, bits + np.uint32(halfway)]).astype(np.uint32).view(np.float32).reshape(-1, 2)
    name = "conversions_half" if dtype == torch.float16 else "conversions_bfloat16"
    out = run_toy(name, x, np.zeros((len(x), 4), np.uint32), grid=(len(x) // 128, 1, 1), block=(128, 1, 1))
    rounded = torch.from_numpy(x).to(dtype)
    is_nan = rounded.isnan().numpy()
    assert np.array_equal(out[:, :2][~is_nan], rounded.view(torch.int16).numpy().view(np.uint16)[~is_nan])
    assert (out[:, :2][is_nan] == 0x7FFF).all()
    assert np.array_equal(out[:, 2], out[:, 0] | out[:, 1] << 16)
    np.testing.assert_array_equal(out[:, 3].view(np.float32), rounded[:, 0].float().numpy())


def test_exponentials_and_high_products():
    x = np.array([0, -np.inf, 1, -1, 0.5, -126, -127, 127, 128, np.inf, np.nan, -3.3], np.float32)
    x = np.resize(x, 32)
    out = run_toy("exponentials", x, np.zeros((2, 32), np.float32))
    expected = np.exp2(x.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    expected[expected >= 2.0**128] = np.inf
    np.testing.assert_allclose(out[0], expected, rtol=3e-7)
    product = x.view(np.uint32).astype(np.uint64) * np.uint64(0x89ABCDEF)
    assert np.array_equal(out[1].view(np.uint32), product >> np.uint64(32))


def test_barrier():
    given = random(128)
    settings = {"block": (128, 1, 1), "shared_bytes": 512}
    assert np.array_equal(run_toy("reverse", given, np.zeros_like(given), **settings), given[::-1])
    without = run_toy("reverse", given, np.zeros_like(given), option=1, **settings)
    assert np.isnan(without).any(), "what no thread has written yet is NaN"


def test_copies_land_at_their_wait():
    given = aligned(random(2, 64, 4))
    copied = given.copy()
    copied[1, 1::2] = 0
    for pending in range(3):
        out = run_toy(
            "copies", given, np.zeros_like(given), option=pending, block=(64, 1, 1), shared_bytes=2048
        )
        landed = 2 - pending
        assert np.array_equal(out[:landed], copied[:landed])
        assert np.isnan(out[landed:]).all()


def test_shared_memory_is_fresh_in_every_block():
    out = run_toy("fresh_memory", NOTHING, np.zeros(32, np.float32), grid=(2, 1, 1), shared_bytes=128)
    assert np.isnan(out).all()


def test_warps_may_end_before_a_barrier():
    out = run_toy("early_end", NOTHING, np.zeros(32, np.int32), block=(96, 1, 1))
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("misplaced_matrices", 0, ""),
        ("misplaced_matrices", 8, "ldmatrix: misaligned address in shared memory"),
        ("misplaced_matrices", 16, "ldmatrix: out of bounds, byte 512 of 512"),
        ("misplaced_copy", 496, ""),
        ("misplaced_copy", 4, "copy_async: misaligned address in shared memory"),
        ("misplaced_copy", 512, "copy_async: out of bounds, byte 512 of 512"),
        ("misplaced_copy", -16, "copy_async: out of bounds, byte -16 of 512"),
        ("misaligned_source", 0, ""),
        ("misaligned_source", 8, "copy_async: misaligned address in global memory"),
        ("store_behind", 511, ""),
        ("store_behind", 512, "a store outside of the shared memory"),
        ("store_behind", -1, "a store outside of the shared memory"),
        ("two_shuffles_that_meet", 0, "divergence, the lane is at __shfl_sync and lane"),
        ("half_a_warp", 0, "deadlock.* 16 lanes wait at __syncwarp in toys.cu:.* 16 lanes have ended"),
        ("barrier_in_half_a_warp", 0, "deadlock.* 16 lanes wait at __syncthreads"),
        ("trap", 37, r"block \(0, 0, 0\), thread 37: trap \(toys.cu:"),
        ("trap", 64, ""),
    ],
)
def test_broken_rules_are_reported(name, option, message):
    def launch():
        shared_bytes = 512 if name != "two_shuffles_that_meet" else 0
        given = aligned(np.zeros(32, np.int32))
        run_toy(
            name, given, np.zeros(64, np.int32), option=option, block=(64, 1, 1), shared_bytes=shared_bytes
        )

    if not message:
        launch()
        return
    with pytest.raises(ToyFailure, match=message):
        launch()
    # the failure leaves nothing behind
    assert (run_toy("early_end", NOTHING, np.zeros(32, np.int32), block=(96, 1, 1)) == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": (1056, 1, 1)}, "invalid configuration argument"),
        ({"grid": (1, 65536, 1)}, "invalid configuration argument"),
        ({"shared_bytes": 49 << 10}, "invalid argument"),
    ],
)
def test_impossible_launches_are_refused(settings, message):
    with pytest.raises(ToyFailure, match=message):
        run_toy("trap", NOTHING, NOTHING, option=-1, **settings)


def test_unknown_schedule(monkeypatch):
    monkeypatch.setenv("LED_HOST_CUDA_SCHEDULE", "random")
    with pytest.raises(ToyFailure, match="give greedy, reversed or lockstep"):
        run_toy("trap", NOTHING, NOTHING, option=-1)
