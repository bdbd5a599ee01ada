"""What smaller weights save and cost: memory, logits and tokens of led_model in fp32, bf16, int8 and NF4.

``python -m benchmarks.quantisation`` compares two models with themselves in fp32, on the same inputs: one of
led-base's shape with random weights, and a small one, trained here for 120 steps to restore masked bytes of
Python's documentation, whose logits mean something. No released weights are at hand.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.table import RESULTS, cpu_model
from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.quantization import quantizable_linears

DEFAULT = RESULTS / "quantisation.csv"
LED_BASE, TRAINED = "led-base's shape, random", "small, trained"
WEIGHTS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "load_in_8bit": True},
    "NF4": {"dtype": torch.float32, "load_in_4bit": True},
    "NF4, bf16": {"dtype": torch.bfloat16, "load_in_4bit": True},
}
MODULES = ("argparse", "collections", "ctypes", "datetime", "decimal", "difflib", "email", "functools", "heapq",
           "inspect", "io", "itertools", "logging", "os", "pathlib", "re", "string")  # fmt: skip
HELD_OUT = ("random", "shutil", "statistics", "textwrap")
BYTE, MASK, VOCAB_SIZE = 4, 3, 260  # ids: a byte is 4 and above


@dataclass(frozen=True)
class Row:
    """``layers_mib`` is the part of ``weights_mib`` in the linear layers, which alone are quantised.

    ``logit_error`` is ‖logits - fp32's‖ / ‖fp32's‖ and ``top1_agreement`` the share of positions with the same
    likeliest token, both teacher-forced; ``greedy_agreement`` is the share of ``new_tokens`` greedy ones that
    are the same, after a first difference with different pasts.
    """

    model: str
    weights: str
    weights_mib: float
    layers_mib: float
    logit_error: float
    top1_agreement: float
    greedy_agreement: float
    documents: int
    source_tokens: int
    target_tokens: int
    new_tokens: int
    train_steps: int = 0
    threads: int = 0
    cpu: str = ""
    torch: str = ""
    bitsandbytes: str = ""
    torchao: str = ""


@dataclass(frozen=True)
class Inputs:
    """ids ``[documents, source]``, teacher-forced decoder ids ``[documents, target]``, and tokens to write."""

    ids: Tensor
    decoder_ids: Tensor
    new_tokens: int

    @property
    def encoder(self) -> dict[str, Tensor]:
        first = torch.zeros_like(self.ids)
        first[:, 0] = 1
        return {"input_ids": self.ids, "global_attention_mask": first}


def random_led_base(smoke: bool) -> tuple[LEDForConditionalGeneration, Inputs]:
    """Weights of std 0.05, wide enough that attention is far from uniform."""
    layers, d_model, ffn_dim, vocab_size = (1, 32, 64, 90) if smoke else (6, 768, 3072, 50265)
    config = LEDConfig(
        vocab_size=vocab_size, d_model=d_model, encoder_layers=layers, decoder_layers=layers,
        encoder_ffn_dim=ffn_dim, decoder_ffn_dim=ffn_dim, encoder_attention_heads=d_model // 64 or 1,
        decoder_attention_heads=d_model // 64 or 1, attention_window=1024, init_std=0.05,
    )  # fmt: skip
    ids = torch.randint(4, vocab_size, (1, 64 if smoke else 512))
    return LEDForConditionalGeneration(config), Inputs(ids, ids[:, :32], 4 if smoke else 8)


def trained(steps: int) -> tuple[LEDForConditionalGeneration, Inputs]:
    """A byte-level denoiser, and documents of modules that it has not seen."""
    config = LEDConfig(
        vocab_size=VOCAB_SIZE, d_model=128, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=512,
        decoder_ffn_dim=512, encoder_attention_heads=4, decoder_attention_heads=4, attention_window=64,
        max_encoder_position_embeddings=256, max_decoder_position_embeddings=256, dropout=0.0,
    )  # fmt: skip
    model, text = LEDForConditionalGeneration(config).train(), documentation(MODULES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        labels = passages(text, 8)
        loss = model(masked(labels), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    labels = passages(documentation(HELD_OUT), 8)
    return model.eval(), Inputs(masked(labels), model.shift_right(labels), 32)


def documentation(modules: Iterable[str]) -> Tensor:
    """All docstrings of the modules and of what they define, as ids of bytes ``[length]``."""
    texts = []
    for name in modules:
        module = importlib.import_module(name)
        for thing in [module, *vars(module).values()]:
            if inspect.ismodule(thing) and thing is not module:
                continue
            if isinstance(doc := getattr(thing, "__doc__", None), str):
                texts.append(inspect.cleandoc(doc))
    text = "\n".join(dict.fromkeys(texts)).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + BYTE


def passages(text: Tensor, count: int, length: int = 128) -> Tensor:
    starts = torch.randint(len(text) - length, (count, 1))
    return text[starts + torch.arange(length)]


def masked(ids: Tensor) -> Tensor:
    return ids.masked_fill(torch.rand(ids.shape) < 0.15, MASK)


def measure(name: str, model: LEDForConditionalGeneration, inputs: Inputs, **about) -> list[Row]:
    """One row for each of :data:`WEIGHTS`, all read from one checkpoint."""
    rows, expected = [], None
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        for weights, arguments in WEIGHTS.items():
            loaded = LEDForConditionalGeneration.from_pretrained(directory, **arguments)
            results = outputs(loaded, inputs)
            expected = expected or results
            linears = quantizable_linears(loaded).values()
            rows.append(
                Row(
                    model=name,
                    weights=weights,
                    weights_mib=mib(loaded),
                    layers_mib=sum(map(mib, linears)),
                    logit_error=((results[0] - expected[0]).norm() / expected[0].norm()).item(),
                    top1_agreement=agreement(results[0].argmax(-1), expected[0].argmax(-1)),
                    greedy_agreement=agreement(results[1], expected[1]),
                    documents=len(inputs.ids),
                    source_tokens=inputs.ids.shape[1],
                    target_tokens=inputs.decoder_ids.shape[1],
                    new_tokens=inputs.new_tokens,
                    **about,
                )
            )
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def outputs(model: LEDForConditionalGeneration, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """fp32 logits ``[documents, target, vocab]`` and the greedy tokens ``[documents, new_tokens]``."""
    logits = model(**inputs.encoder, decoder_input_ids=inputs.decoder_ids).logits.float()
    count = inputs.new_tokens
    return logits, model.generate(**inputs.encoder, max_new_tokens=count, min_new_tokens=count)[:, 1:]


def agreement(ours: Tensor, expected: Tensor) -> float:
    return (ours == expected).float().mean().item()


def mib(module: nn.Module) -> float:
    """What the parameters and buffers take, with the scales of quantised ones."""
    return sum(map(_bytes, [*module.parameters(), *module.buffers()])) / 2**20


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: int8 values and scales
        names, _ = tensor.__tensor_flatten__()
        return sum(getattr(tensor, name).nbytes for name in names)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: largest magnitudes and the table of values
    return tensor.nbytes + (state.absmax.nbytes + state.code.nbytes if state else 0)


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            Row(**{field.name: kinds[field.type](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def markdown(rows: list[Row]) -> str:
    """The README's table and what it was measured on."""
    lines = [
        "| model | weights | MiB | of fp32 | layers of fp32 | logit error | same top-1 | same greedy tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full = {}
    for row in rows:
        full.setdefault(row.model, row)
        # with random weights one token is the likeliest everywhere: whether it stays so says nothing
        same_tokens = f"{row.top1_agreement:.1%} | {row.greedy_agreement:.1%}" if row.train_steps else "– | –"
        lines.append(
            f"| {row.model} | {row.weights} | {row.weights_mib:,.1f} "
            f"| {row.weights_mib / full[row.model].weights_mib:.2f} "
            f"| {row.layers_mib / full[row.model].layers_mib:.2f} | {row.logit_error:.1%} | {same_tokens} |"
        )
    about = rows[0]
    sizes = "; ".join(
        f"{r.model}: {r.documents} documents of {r.source_tokens:,} tokens, {r.target_tokens} teacher-forced and "
        f"{r.new_tokens} greedy tokens each" + (f", after {r.train_steps} steps" if r.train_steps else "")
        for r in full.values()
    )
    ran_on = f"torch {about.torch}, bitsandbytes {about.bitsandbytes}, torchao {about.torchao}"
    return "\n".join([*lines, "", f"{sizes}. One run on {about.cpu}, {ran_on}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and quality of smaller weights.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=DEFAULT, help="a CSV, written anew")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and no training to speak of")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = {
        "threads": arguments.threads, "cpu": cpu_model(), "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"), "torchao": version("torchao"),
    }  # fmt: skip
    rows = measure(LED_BASE, *random_led_base(arguments.smoke), **about)
    steps = 3 if arguments.smoke else 120
    rows += measure(TRAINED, *trained(steps), train_steps=steps, **about)
    write(arguments.output, rows)
    print(markdown(read(arguments.output)))


if __name__ == "__main__":
    main()
