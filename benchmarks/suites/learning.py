"""This suite trains a small LED on real papers, to write a passage that is missing from a long document.

Its validation loss is compared with that of a unigram model, which knows how frequent each token is and no more.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import table
from benchmarks.suites import papers
from led_model import (
    LEDConfig,
    LEDDataCollator,
    LEDForConditionalGeneration,
    LEDTokenizer,
    TokenBatchSampler,
    TokensWithId,
)

DEFAULT = table.RESULTS / "learning.csv"
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Settings:
    """Holds what a run is made of; lengths are in tokens.

    A document has ``shortest`` to ``longest`` tokens, with one ``<mask>`` in the place of ``passage`` tokens, which
    are to be written. A batch has as many documents as ``batch_tokens`` hold, packed.
    """

    steps: int = 400
    evaluate_every: int = 40
    batch_tokens: int = 4096
    shortest: int = 512
    longest: int = 4096
    passage: int = 512
    held_out: int = 25
    vocab_size: int = 512
    d_model: int = 128
    layers: int = 2
    attention_window: int = 256
    # With led-base's 0.02 and a rate of 3e-3 the loss stays at a unigram model's.
    init_std: float = 0.05
    learning_rate: float = 1e-3
    warmup: int = 100
    seed: int = 0


SMOKE = Settings(
    steps=4, evaluate_every=2, batch_tokens=128, shortest=24, longest=64, passage=16, held_out=2, vocab_size=300,
    d_model=64, layers=1, attention_window=16, warmup=1,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Holds the losses after a number of steps, in nats per token.

    ``training_loss`` is the mean since the row before; the other losses are over the same
    ``held_out_tokens``. ``seconds`` is the time of the training steps alone. ``source_tokens`` and ``target_tokens``
    were read and written in training.
    """

    step: int
    training_loss: float | None
    validation_loss: float
    unigram_loss: float
    seconds: float
    source_tokens: int
    target_tokens: int
    held_out_tokens: int
    parameters: int
    papers: int
    longest: int
    passage: int
    vocab_size: int
    threads: int
    cpu: str
    torch: str


@dataclass
class Corpus:
    """Holds papers as ids, those to train on and those held out, and makes documents with a missing passage of them."""

    tokenizer: LEDTokenizer
    training: list[list[int]]
    held_out: list[list[int]]
    settings: Settings
    collate: LEDDataCollator = field(init=False)

    def __post_init__(self) -> None:
        mask = self.tokenizer.mask_token_id
        self.collate = LEDDataCollator(
            self.tokenizer, global_tokens=["first", TokensWithId((mask,))], packing=True
        )

    def length(self, draw: Random) -> int:
        """Returns a length between the bounds, log-uniform: as many of one to two thousand tokens as of two to four."""
        return int(self.settings.shortest * (self.settings.longest / self.settings.shortest) ** draw.random())

    def document(self, paper: list[int], length: int, draw: Random) -> dict[str, list[int]]:
        """Returns a feature of ``length`` tokens of a paper, or of all that it has, one passage of them as labels."""
        room = length - 3 + self.settings.passage  # <s>, <mask> and </s> are read, too
        start = draw.randrange(max(1, len(paper) - room + 1))
        text = paper[start : start + room]
        first = draw.randrange(len(text) - self.settings.passage + 1)
        last = first + self.settings.passage
        bos, mask, eos = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "mask", "eos"))
        return {"input_ids": [bos, *text[:first], mask, *text[last:], eos], "labels": text[first:last]}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yields batches of other documents of all papers in each epoch, without an end."""
        settings, epoch = self.settings, 0
        while True:
            draw = Random(f"{settings.seed} {epoch}")
            documents = [self.document(paper, self.length(draw), draw) for paper in self.training]
            lengths = [len(document["input_ids"]) for document in documents]
            sampler = TokenBatchSampler(lengths, settings.batch_tokens, seed=epoch)
            yield from DataLoader(documents, batch_sampler=sampler, collate_fn=self.collate)
            epoch += 1

    def held_out_batches(self) -> list[dict[str, Tensor]]:
        """Returns batches of the longest documents of the papers held out, the same at every call."""
        draw = Random(self.settings.seed)
        documents = [self.document(paper, self.settings.longest, draw) for paper in self.held_out]
        return list(DataLoader(documents, batch_size=2, collate_fn=self.collate))


def read_corpus(texts: Sequence[str], settings: Settings) -> Corpus:
    """Returns the papers, shuffled, as ids of a byte-level BPE that is trained on those that are not held out.

    Raises:
        ValueError: for a paper that is shorter than two passages.
    """
    from tokenizers import ByteLevelBPETokenizer

    texts = list(texts)
    Random(settings.seed).shuffle(texts)
    held_out, training = texts[: settings.held_out], texts[settings.held_out :]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(training, settings.vocab_size, special_tokens=list(_SPECIAL), show_progress=False)
    with tempfile.TemporaryDirectory() as directory:
        bpe.save_model(directory)
        tokenizer = LEDTokenizer.from_pretrained(directory)
    split = [
        tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for part in (training, held_out)
    ]
    shortest = min(map(len, split[0] + split[1]))
    if shortest < 2 * settings.passage:
        raise ValueError(f"a paper has {shortest} tokens; give passages of half of it at most.")
    return Corpus(tokenizer, *split, settings)


def unigram_loss(training: Sequence[Sequence[int]], targets: Tensor, vocab_size: int) -> float:
    """Returns the mean of -log p over ``targets``, with p the frequency in ``training``, one added to every count."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for ids in training:
        counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return -(counts / counts.sum()).log()[targets].mean().item()


@torch.no_grad()
def evaluate(model: LEDForConditionalGeneration, batches: Sequence[dict[str, Tensor]]) -> float:
    """Returns the mean loss per token of the labels."""
    model.eval()
    counts = [len(batch["labels"]) for batch in batches]
    losses = [model(**batch).loss.item() * count for batch, count in zip(batches, counts, strict=True)]
    model.train()
    return sum(losses) / sum(counts)


def train(corpus: Corpus, **about) -> Iterator[Row]:
    """Trains a model from random weights, and yields a row before the first step and after each part of them."""
    settings = corpus.settings
    torch.manual_seed(settings.seed)
    vocab_size, heads = len(corpus.tokenizer), settings.d_model // 64
    model = LEDForConditionalGeneration(
        LEDConfig(
            vocab_size=vocab_size, d_model=settings.d_model, encoder_layers=settings.layers,
            decoder_layers=settings.layers, encoder_ffn_dim=4 * settings.d_model,
            decoder_ffn_dim=4 * settings.d_model, encoder_attention_heads=heads, decoder_attention_heads=heads,
            attention_window=settings.attention_window, max_encoder_position_embeddings=settings.longest,
            max_decoder_position_embeddings=settings.passage,
            init_std=settings.init_std, dropout=0.0,  # documents are new in every epoch
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / settings.warmup) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        ),
    )
    held_out = corpus.held_out_batches()
    targets = torch.cat([batch["labels"] for batch in held_out])
    about |= {
        "unigram_loss": unigram_loss(corpus.training, targets, vocab_size), "held_out_tokens": len(targets),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "papers": len(corpus.training) + len(corpus.held_out), "longest": settings.longest,
        "passage": settings.passage, "vocab_size": vocab_size,
    }  # fmt: skip
    seconds, source_tokens, target_tokens, losses = 0.0, 0, 0, []

    def row(step: int) -> Row:
        return Row(
            step=step,
            training_loss=sum(losses) / len(losses) if losses else None,
            validation_loss=evaluate(model, held_out),
            seconds=seconds,
            source_tokens=source_tokens,
            target_tokens=target_tokens,
            **about,
        )

    yield row(0)
    batches = corpus.batches()
    for step in range(1, settings.steps + 1):
        batch = next(batches)
        begin = time.perf_counter()
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - begin
        source_tokens += len(batch["input_ids"])
        target_tokens += len(batch["labels"])
        if step % settings.evaluate_every == 0 or step == settings.steps:
            yield row(step)
            losses.clear()


def markdown(rows: Sequence[Row]) -> str:
    """Returns what the README says of the run."""
    last = rows[-1]
    return (
        f"A small LED ({last.parameters / 1e6:.1f} million parameters) learns to write {last.passage} tokens that are "
        f"missing from a document of up to {last.longest:,}, of {last.papers} papers. On papers that it has not seen "
        f"its loss is {last.validation_loss:.2f} nats per token after {last.step:,} steps, in "
        f"{last.seconds / 60:.0f} minutes, and a unigram model's {last.unigram_loss:.2f}. One run of {last.threads} "
        f"threads on {last.cpu}, torch {last.torch}.\n\n"
        f"Made by `python -m benchmarks learning --threads {last.threads}`."
    )


def texts_of_smoke() -> list[str]:
    """Returns generated papers, in which a few words follow each other by rules."""
    draw = Random(0)
    words = [f"w{draw.randrange(10**6)}" for _ in range(30)]
    return [" ".join(words[(start + i * i) % 30] for i in range(60)) for start in range(8)]


def run(out: Path, *, smoke: bool, threads: int) -> int:
    """Trains into a new CSV, prints the README's text and returns a command's exit status.

    Until it ends, its rows are in OUT.partial, so that OUT always holds one whole run.
    """
    torch.set_num_threads(threads)
    settings = SMOKE if smoke else Settings()
    texts = texts_of_smoke() if smoke else papers.read_papers(papers.download(papers.default_cache()))
    about = {"threads": threads, "cpu": table.cpu_model(), "torch": torch.__version__}
    partial = out.with_suffix(out.suffix + ".partial")
    rows: list[Row] = []
    for row in train(read_corpus(texts, settings), **about):
        rows.append(row)
        table.write(partial, rows)
        print(
            f"step {row.step:6,}  validation {row.validation_loss:.3f}  unigram {row.unigram_loss:.3f}  "
            f"{row.seconds:,.0f} s",
            flush=True,
        )
    partial.replace(out)
    print(markdown(rows))
    return 0
