"""The training run: its documents, what its losses are compared with, and the download of its papers."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import table
from benchmarks.report import plot
from benchmarks.suites import learning, papers


@pytest.fixture(scope="module")
def corpus() -> learning.Corpus:
    return learning.read_corpus(learning.texts_of_smoke(), learning.SMOKE)


def test_smoke_run(tmp_path: Path) -> None:
    """A few steps on generated documents write a row each two, and lower the loss."""
    path = tmp_path / "learning.csv"
    assert main(["learning", "--smoke", "--threads", "1", "--out", str(path)]) == 0
    rows = table.read(path, learning.Row)
    assert [row.step for row in rows] == [0, 2, 4]
    first, middle, last = rows
    assert first.training_loss is None
    assert first.validation_loss == pytest.approx(math.log(first.vocab_size), rel=0.05)
    assert last.validation_loss < middle.validation_loss < first.validation_loss
    assert first.seconds == first.source_tokens == first.target_tokens == 0
    settings = learning.SMOKE
    assert last.source_tokens <= settings.steps * settings.batch_tokens
    assert last.target_tokens >= settings.steps * settings.passage
    assert last.target_tokens % settings.passage == 0
    assert last.held_out_tokens == settings.held_out * settings.passage
    plot.plot_learning(rows, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 5_000
    said = learning.markdown(rows)
    assert f"{last.validation_loss:.2f} nats per token" in said
    assert "python -m benchmarks learning --threads 1" in said


def test_the_committed_run_knows_more_than_frequencies() -> None:
    rows = table.read(learning.DEFAULT, learning.Row)
    settings = learning.Settings()
    assert [row.step for row in rows] == list(range(0, settings.steps + 1, settings.evaluate_every))
    assert rows[0].validation_loss > rows[0].unigram_loss
    assert rows[-1].validation_loss < rows[-1].unigram_loss - 0.5
    assert learning.DEFAULT.with_suffix(".png").exists()
    for row in rows:
        assert (row.longest, row.passage, row.vocab_size) == (
            settings.longest, settings.passage, settings.vocab_size,
        )  # fmt: skip


def test_a_passage_is_missing_from_a_document(corpus: learning.Corpus) -> None:
    draw = Random(0)
    for length in (24, 40, 64, 10_000):
        for paper in corpus.training:
            document = corpus.document(paper, length, draw)
            ids, labels = document["input_ids"], document["labels"]
            assert len(labels) == corpus.settings.passage
            assert len(ids) == min(length, len(paper) - len(labels) + 3)
            at = ids.index(corpus.tokenizer.mask_token_id)
            whole = [*ids[1:at], *labels, *ids[at + 1 : -1]]
            assert any(paper[i : i + len(whole)] == whole for i in range(len(paper) - len(whole) + 1))
            assert (ids[0], ids[-1]) == (corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id)


def test_batches_mark_the_missing_passage(corpus: learning.Corpus) -> None:
    batch = next(corpus.batches())
    expected = batch["input_ids"] == corpus.tokenizer.mask_token_id
    expected[batch["cu_seqlens"][:-1].long()] = True
    assert torch.equal(batch["global_attention_mask"] == 1, expected)


def test_papers_held_out_are_not_trained_on(corpus: learning.Corpus) -> None:
    assert len(corpus.held_out) == learning.SMOKE.held_out
    assert len(corpus.training) == len(learning.texts_of_smoke()) - learning.SMOKE.held_out
    assert not {tuple(paper) for paper in corpus.held_out} & {tuple(paper) for paper in corpus.training}


def test_unigram_loss() -> None:
    """Counts 2, 1 and 0 become 3/6, 2/6 and 1/6."""
    found = learning.unigram_loss([[0, 1], [0]], torch.tensor([0, 2, 2]), 3)
    assert found == pytest.approx((math.log(2) + 2 * math.log(6)) / 3)


def test_a_paper_without_room_for_a_passage() -> None:
    with pytest.raises(ValueError, match="a paper has 3 tokens; give passages of half of it"):
        learning.read_corpus([*learning.texts_of_smoke(), "abc"], learning.SMOKE)


class TestDownload:
    @pytest.fixture
    def wheel(self, tmp_path: Path) -> Path:
        path = tmp_path / papers.WHEEL
        with zipfile.ZipFile(path, "w") as archive:
            for name, parts in (("b", ["Third."]), ("a", ["First.", "Second."])):
                paper = {"abstract": "no", "pdf_parse": {"body_text": [{"text": text} for text in parts]}}
                archive.writestr(f"aclsum/dataset/paper_jsons/{name}.json", json.dumps(paper))
            archive.writestr("aclsum/dataset/other.json", "{}")
        return path

    def test_another_file_is_refused(self, wheel: Path) -> None:
        with pytest.raises(RuntimeError, match=r"is not the published aclsum.*delete it"):
            papers.download(wheel.parent)

    def test_what_is_there_is_not_fetched_again(self, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(papers, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        assert papers.download(wheel.parent) == wheel

    def test_without_an_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(RuntimeError, match=r"pip cannot download aclsum==0.1.2: .*aclsum"):
            papers.download(tmp_path / "new")

    def test_bodies_come_in_the_order_of_their_names(self, wheel: Path) -> None:
        assert papers.read_papers(wheel) == ["First.\nSecond.", "Third."]
