"""The parts of ``led finetune``: what a step is counted to keep, ROUGE, and which evaluation is the best."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.harness.saved_tensors import saved_tensors
from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.training import interruption, run_directory
from led_model.training.memory import activation_bytes, count_parameters, has_room

pytest.importorskip("transformers")
schedule = pytest.importorskip("led_model.training.schedule")
scores = pytest.importorskip("led_model.training.scores")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")


def kept_bytes(model: LEDForConditionalGeneration, sources: int, targets: int, dtype: torch.dtype) -> int:
    """Returns what autograd keeps of a step, and the logits."""
    ids, labels = torch.randint(4, 300, (1, sources)), torch.randint(4, 300, (1, targets))
    marks = (torch.arange(sources) == 0).long()[None]
    outputs = []

    def forward() -> None:
        outputs.append(model(ids, torch.ones_like(ids), global_attention_mask=marks, labels=labels))

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        kept = saved_tensors(model, forward)
    return sum(saved.nbytes for saved in kept) + outputs[0].logits.nbytes


@pytest.mark.parametrize("ffn", [256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_keeps_is_counted(ffn, dtype):
    """Within 10 % of how it grows with the tokens; weights, and what they are cast to, do not."""
    config = LEDConfig(
        vocab_size=300, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn, attention_window=64,
        max_encoder_position_embeddings=1024, max_decoder_position_embeddings=512,
    )  # fmt: skip
    model = LEDForConditionalGeneration(config).train()
    assert count_parameters(config) == model.num_parameters()
    long, short = (1024, 256), (512, 128)

    def counted(checkpointing: bool) -> int:
        more, less = (activation_bytes(config, *size, dtype, checkpointing, False) for size in (long, short))
        return more - less

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        grown = kept_bytes(model, *long, dtype) - kept_bytes(model, *short, dtype)
        if not checkpointing:
            assert counted(False) == pytest.approx(grown, rel=0.1)
        else:  # what is kept while a layer is computed again is not seen here
            assert grown < counted(True) < counted(False) / 2
    assert has_room(10, 0, None)
    assert has_room(10, 80, 100)
    assert not has_room(20, 80, 100)


TEXTS = [
    (
        "The encoders are reading a long text.\nThe decoder writes.",
        "The encoder reads long texts; it writes.",
    ),
    ("A short one", "A short one"),
    ("one_two 3.5 don't", "two three 3 5"),
    ("Something", "else"),
]


def test_rouge_of_english_is_the_package_s():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
    expected = [scorer.score(*pair) for pair in TEXTS]
    found = scores.rouge(*zip(*TEXTS, strict=True))
    for name in ("rouge1", "rouge2", "rougeLsum"):
        assert found[name] == pytest.approx(
            100 * sum(score[name].fmeasure for score in expected) / len(TEXTS)
        )


@pytest.mark.parametrize("text", ["Зелёный дом", "größere Häuser", "長い文章", "ελληνικά"])
def test_rouge_knows_other_letters(text):
    assert scores.rouge([text], [text])["rouge1"] == 100
    assert scores.rouge([text], ["xyz"])["rouge1"] == 0


def test_the_best_evaluation():
    log = [
        {"step": step, "eval_loss": loss, "eval_rougeLsum": score}
        for step, loss, score in (
            (1, 3.0, 10.0),
            (2, 2.0, 30.0),
            (3, 1.9, 30.0),
            (4, 1.8, 20.0),
            (5, 1.9, 25.0),
        )
    ]
    judge = schedule.Judge("eval_rougeLsum", 2)
    assert judge.best([{"step": 1, "loss": 1.0}]) is None
    assert not judge.gives_up([])
    assert judge.best(log)["step"] == 3  # of two with the same ROUGE that with the lower loss
    assert [judge.gives_up(log[:count]) for count in range(1, 6)] == [False, False, False, False, True]
    assert schedule.Judge("eval_loss").best(log)["step"] == 4


class Crash(BaseException):
    """Stands for a SIGKILL."""


def test_a_result_is_whole_or_not_there(tmp_path, monkeypatch):
    """Whatever is the last file that a process has renamed; the next process finishes the work."""
    names = ("model.safetensors", "config.json", "tokenizer.json")
    replace = os.replace

    def work(calls: int) -> None:
        left = calls

        def counted(source: Path, target: Path) -> None:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            with run_directory.RunDirectory(str(output)) as directory:
                if directory.settings is None:
                    directory.begin({"--seed": 1, "chosen": {}})
                if directory.latest_step is None and not directory.is_finished:
                    with directory.new_checkpoint(3) as around:
                        (around / "checkpoint-3").mkdir()
                        for name in (*names, "optimizer.pt"):
                            (around / "checkpoint-3" / name).write_text(name)
                if not directory.is_finished:
                    directory.finish(3)
                directory.keep_checkpoints([])

    for calls in range(7):
        output = tmp_path / str(calls)
        try:
            work(calls)
            assert calls >= 5
        except Crash:
            assert calls < 5
        assert (output / "config.json").exists() == (calls == 5 or calls == 6)
        there = {path.name for path in output.iterdir()} if output.exists() else set()
        if "checkpoint-3" in there:
            assert len(list((output / "checkpoint-3").iterdir())) == 4
        work(99)
        assert {path.name for path in output.iterdir()} == {*names, "finetune.json"}
        assert all((output / name).read_text() == name for name in names)


def test_a_damaged_output_is_refused(tmp_path):
    for text in ("", "{", "[]", '{"led": "summarize"}', '{"led": "finetune"}'):
        (tmp_path / "finetune.json").write_text(text)
        with pytest.raises(ValueError, match="is not of led finetune; give another directory"):
            run_directory.RunDirectory(str(tmp_path))


def test_a_second_signal_stops_at_once():
    told = []
    with interruption.Interruption(lambda: told.append("finishing")) as asked:
        assert not asked.is_asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_asked
        assert told == ["finishing"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
