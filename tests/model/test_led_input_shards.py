"""Shards of files: every document in one of them, the same as in the whole file, and named as there."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from led_model.batch import Document, input_shards
from led_model.batch.documents import Source, Unreadable
from led_model.batch.input_shards import Lines, Rows, cut_shards


def read(sources: Sequence[Source]) -> list[Document | Unreadable]:
    return [document for source in sources for document in source.read()]


@pytest.mark.parametrize("seed", range(8))
def test_lines(tmp_path, monkeypatch, seed):
    """Blank lines, bad ones, any end of a line or none at the end, and blocks that end anywhere."""
    draw = random.Random(seed)
    monkeypatch.setattr(input_shards, "_BLOCK", draw.choice([1, 7, 64, 2**20]))
    lines = []
    for number in range(draw.randrange(1, 40)):
        own = json.dumps({"id": f"é{number}", "text": "own id"}, ensure_ascii=False)
        lines.append(draw.choice(["", " ", "{", own, own, json.dumps({"text": "no\u2028id"})]))
    path = tmp_path / "a.jsonl"
    end = draw.choice(["\n", "\r\n"])
    path.write_bytes((end.join(lines) + draw.choice(["", end])).encode())
    whole = read([Source(str(path), True)])
    for size in (1, 2, 3, 7, 100):
        shards = list(cut_shards([Source(str(path), True)], size))
        assert all(isinstance(source, Lines) and source.count <= size for (source,) in shards)
        assert [document for shard in shards for document in read(shard)] == whole


def test_each_line_is_in_one_shard(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(1, 1001)))
    for size in (1, 7, 999, 1000, 1001):
        found = [d for shard in cut_shards([Source(str(path), True)], size) for d in read(shard)]
        assert [(d.id, d.text) for d in found] == [(n, f"text {n}") for n in range(1, 1001)]


@pytest.mark.parametrize("row_group_size", [1, 5, 64])
@pytest.mark.parametrize("has_ids", [False, True])
def test_parquet(tmp_path, row_group_size, has_ids):
    path = tmp_path / "a.parquet"
    columns = {"other": list(range(23)), "body": [f"text {number}" for number in range(23)]}
    columns["body"][4] = None
    ids = list(range(1, 24))
    if has_ids:
        ids = columns["id"] = [f"d{number}" for number in range(23)]
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    for size in (1, 4, 5, 23, 50):
        shards = list(cut_shards([Source(str(path), False, "body")], size))
        assert all(isinstance(source, Rows) for (source,) in shards)
        assert len(shards) == -(-23 // size)
        found = [document for shard in shards for document in read(shard)]
        bad = found.pop(4)
        assert bad.message == (
            f"{path} line 5 has no text in 'body'; give a string that is not blank, or a list of such strings."
        )
        expected = [(ids[n], f"text {n}", has_ids) for n in range(23) if n != 4]
        assert [(d.id, d.text, d.has_own_id) for d in found] == expected


def test_files_of_one_text(tmp_path):
    sources = []
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
        sources.append(Source(str(tmp_path / f"{number}.txt"), False))
    assert list(cut_shards(sources, 2)) == [tuple(sources[:2]), tuple(sources[2:4]), tuple(sources[4:])]


def test_files_that_are_damaged_after_they_were_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    [shard] = cut_shards([Source(str(path), True)], 2)
    path.unlink()
    [unreadable] = read(shard)
    assert unreadable.message == f"{path} cannot be read (No such file or directory); it is there no more."
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    [shard] = cut_shards([Source(str(path), False)], 2)
    Path(path).write_bytes(b"no parquet, but long enough to be read as one")
    [unreadable] = read(shard)
    assert isinstance(unreadable, Unreadable)
    assert unreadable.message.startswith(f"{path} cannot be read (Parquet magic bytes not found")


def test_what_parquet_stores_otherwise(tmp_path):
    """Text as bytes, ids that pandas has made floats, long texts that JSON would escape, and what is no text at all."""
    path = tmp_path / "a.parquet"
    long = "д" * (10 * 2**20)  # 20 MiB of UTF-8, and 60 MiB escaped
    columns = {"id": [1.0, None, 3.0, 4.5], "text": [b"bytes", b"\xff", long.encode(), b"x"]}
    pq.write_table(pa.table(columns), path)
    [shard] = cut_shards([Source(str(path), False)])
    first, second, third, fourth = read(shard)
    assert (first.id, first.text) == (1, "bytes")
    assert second.message == f"{path} line 2 is not UTF-8 at byte 0; convert it."
    assert (third.id, third.text == long) == (3, True)
    assert fourth.message == f"{path} line 4 has the id 4.5; give a string or an integer, or none."
    pq.write_table(pa.table({"text": pa.array([0], pa.timestamp("s"))}), path)
    [shard] = cut_shards([Source(str(path), False)])
    [found] = read(shard)
    assert "has no text in 'text'" in found.message


def test_rows_before_a_shard_are_not_made_objects(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(number) for number in range(2000)]}), path)
    *_, last = cut_shards([Source(str(path), False)], 300)
    made = []

    class Batch:
        def __init__(self, batch: pa.RecordBatch) -> None:
            self.batch, self.num_rows = batch, batch.num_rows

        def slice(self, *bounds: int) -> Batch:
            return Batch(self.batch.slice(*bounds))

        def to_pylist(self) -> list[dict]:
            made.append(self.num_rows)
            return self.batch.to_pylist()

    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args: map(Batch, real(*args)))
    assert [document.text for document in read(last)] == [str(number) for number in range(1800, 2000)]
    assert sum(made) == 200


def test_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    [shard] = cut_shards([Source(str(path), True)])
    path.write_text('{"text": "a"}\n' * 2)
    *documents, unreadable = read(shard)
    assert len(documents) == 2
    assert "it ends after line 2 and was longer before" in unreadable.message
