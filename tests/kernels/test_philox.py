"""Philox4x32-10 and the dropout masks drawn from it, against known answers and plain integers.

``philox_vectors.json`` holds what every backend in every language must draw; run this file as a program to write it
anew from the plain-integer implementation below.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from led_kernels.philox import BANDED_STREAM, GLOBAL_STREAM, dropout_threshold, keep_mask, philox4x32

VECTORS = Path(__file__).with_name("philox_vectors.json")
# counter, key, output: kat_vectors of Random123 1.14
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in Python integers, after the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def plain_keep(seed: int, query: int, key: int, batch_head: int, stream: int, dropout_p: float) -> bool:
    draw = plain_philox([key // 4, query, batch_head, stream], list(reversed(divmod(seed, 2**32))))[key % 4]
    return draw >= round(dropout_p * 2**32)


def make_vectors() -> list[dict]:
    """One entry: positions, and for each query a string of one digit per key, 1 where it is kept."""
    settings = [
        (0, 0.5, BANDED_STREAM, 0, range(4), range(16)),
        (1, 0.1, BANDED_STREAM, 3, range(100, 104), range(90, 115)),
        (2**32 + 7, 0.1, GLOBAL_STREAM, 3, [0, 5, 4095], range(32)),
        (0x123456789ABCDEF, 0.25, BANDED_STREAM, 191, [16383], range(16350, 16384)),
        (2**63 - 2, 0.9, GLOBAL_STREAM, 2**20, [16383, 70000], range(65530, 65550)),
        (42, 0.0, BANDED_STREAM, 1, [1], range(8)),
        (42, 1.0, BANDED_STREAM, 1, [1], range(8)),
        (42, 1e-4, BANDED_STREAM, 1, [1], range(40)),
    ]
    vectors = []
    for seed, dropout_p, stream, batch_head, queries, keys in settings:
        keep = [
            "".join(str(int(plain_keep(seed, i, j, batch_head, stream, dropout_p))) for j in keys)
            for i in queries
        ]
        positions = {"queries": list(queries), "keys": list(keys)}
        drawn = {"seed": seed, "dropout_p": dropout_p, "stream": stream, "batch_head": batch_head}
        vectors.append(drawn | positions | {"keep": keep})
    return vectors


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert plain_philox(words(counter), words(key)) == words(output)
    drawn = philox4x32(*(tuple(torch.tensor([word]) for word in words(text)) for text in (counter, key)))
    assert [x.item() for x in drawn] == words(output)


def test_committed_vectors_are_the_plain_ones():
    assert json.loads(VECTORS.read_text(encoding="utf-8")) == make_vectors()


@pytest.mark.parametrize(
    "vector", json.loads(VECTORS.read_text(encoding="utf-8")) if VECTORS.exists() else []
)
def test_keep_mask_draws_the_committed_vectors(vector):
    keep = keep_mask(
        torch.tensor([vector["seed"]]),
        torch.tensor(vector["queries"])[:, None],
        torch.tensor(vector["keys"]),
        torch.tensor(vector["batch_head"]),
        vector["stream"],
        vector["dropout_p"],
    )
    assert keep.dtype == torch.bool
    assert ["".join(str(int(bit)) for bit in row) for row in keep] == vector["keep"]


def test_keep_mask_broadcasts_over_batch_heads():
    batch_head = torch.arange(6).view(2, 3, 1, 1)
    keep = keep_mask(
        torch.tensor([9]), torch.arange(5)[:, None], torch.arange(7), batch_head, GLOBAL_STREAM, 0.5
    )
    assert keep.shape == (2, 3, 5, 7)
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(7)):
        assert keep[b, h, i, j].item() == plain_keep(9, i, j, 3 * b + h, GLOBAL_STREAM, 0.5)


def test_threshold():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(1.0) == 2**32  # above every draw


def write_vectors() -> None:
    lines = [json.dumps(vector) for vector in make_vectors()]
    VECTORS.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write_vectors()
