"""The collator and the samplers in transformers' Trainer."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import torch
import transformers
from torch.utils.data import DataLoader

import led_model
from led_model import LEDDataCollator, LEDTokenizer, TokenBatchSampler
from tests.model.small import small_config

TEXTS = ["The encoder reads the whole text. " * count for count in (1, 6, 2, 5, 3, 4, 1, 2)]


@pytest.fixture
def features(tokenizer_files):
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_files)
    rows = [dict(tokenizer(text, text_target="a short one")) for text in TEXTS]
    return tokenizer, [row | {"text": text} for row, text in zip(rows, TEXTS, strict=True)]


def arguments(tmp_path, **settings):
    return transformers.Seq2SeqTrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("library", [transformers, led_model], ids=["transformers", "led_model"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_features_with_other_columns(features, tmp_path, library, smoothing):
    """Trainer takes them off and groups by length; label smoothing has the decoder's input from the collator."""
    tokenizer, rows = features
    torch.manual_seed(0)
    model = library.LEDForConditionalGeneration(
        library.LEDConfig(**small_config(0, vocab_size=len(tokenizer)))
    )
    seen, forward = [], model.forward

    def watch(**inputs):
        seen.append(inputs)
        return forward(**inputs)

    watch.__signature__ = inspect.signature(forward)
    model.forward = watch
    grouping = {"train_sampling_strategy": "group_by_length"}
    if int(transformers.__version__.split(".")[0]) < 5:
        grouping = {"group_by_length": True}
    trainer = transformers.Seq2SeqTrainer(
        model,
        arguments(tmp_path, label_smoothing_factor=smoothing, **grouping),
        train_dataset=rows,
        data_collator=LEDDataCollator(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen) == len(rows) / 2
    lengths = [int(inputs["attention_mask"].sum(1).max()) for inputs in seen]
    assert lengths[0] == max(len(row["input_ids"]) for row in rows)
    for inputs in seen:
        assert inputs["global_attention_mask"][:, 0].tolist() == [1, 1]
        assert "decoder_input_ids" in inputs
    assert all(0 < entry["loss"] < 20 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_batches_by_tokens(features, tmp_path, smoothing):
    """led_model reads them; every document is in each epoch once, and the loss falls."""
    tokenizer, rows = features
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    torch.manual_seed(0)
    model = led_model.LEDForConditionalGeneration(
        led_model.LEDConfig(**small_config(0, vocab_size=len(tokenizer)))
    )
    collate = LEDDataCollator(tokenizer, packing=True, model=model)
    seen = []

    class Trainer(transformers.Seq2SeqTrainer):
        def get_train_dataloader(self):
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
            sampler = TokenBatchSampler(lengths, max_tokens=max(lengths))
            loader = DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    def remember(features):
        seen.append(sorted(len(feature["input_ids"]) for feature in features))
        return collate(features)

    settings = arguments(tmp_path, label_smoothing_factor=smoothing, learning_rate=1e-2)
    settings.num_train_epochs = 3
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=remember, processing_class=tokenizer)
    trainer.train()
    steps = trainer.state.global_step // 3
    assert steps == len(trainer.get_train_dataloader()) < len(rows)
    for epoch in (seen[:steps], seen[steps : 2 * steps], seen[2 * steps :]):
        assert sorted(sum(epoch, [])) == sorted(len(row["input_ids"]) for row in rows)  # noqa: RUF017
    assert seen[:steps] != seen[steps : 2 * steps]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
