"""This suite measures what smaller weights save and cost led_model in fp32, bf16, int8 and NF4.

A model of led-base's shape is compared with itself in fp32, on the same inputs. Its weights are random: no released
ones are at hand.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import table
from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.checkpoint.quantization import quantizable_linears

DEFAULT = table.RESULTS / "quantization.csv"
WEIGHTS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "load_in_8bit": True},
    "NF4": {"dtype": torch.float32, "load_in_4bit": True},
    "NF4, bf16": {"dtype": torch.bfloat16, "load_in_4bit": True},
}


@dataclass(frozen=True)
class Row:
    """Holds a measurement; ``layers_mib`` of ``weights_mib`` are in the linear layers, which alone are quantized.

    ``logit_error`` is ‖logits - fp32's‖ / ‖fp32's‖ and ``top1_agreement`` the share of positions with the same
    likeliest token, both teacher-forced, with ``distinct_tokens`` different ones; ``greedy_agreement`` is the
    share of ``new_tokens`` greedy ones that are the same, after a first difference with different pasts.
    """

    weights: str
    weights_mib: float
    layers_mib: float
    logit_error: float
    distinct_tokens: int
    top1_agreement: float
    greedy_agreement: float
    documents: int
    source_tokens: int
    target_tokens: int
    new_tokens: int
    threads: int = 0
    cpu: str = ""
    torch: str = ""
    bitsandbytes: str = ""
    torchao: str = ""


@dataclass(frozen=True)
class Inputs:
    """Holds ids ``[documents, source]``, teacher-forced decoder ids ``[documents, target]``, and tokens to write."""

    ids: Tensor
    decoder_ids: Tensor
    new_tokens: int

    @property
    def encoder(self) -> dict[str, Tensor]:
        first = torch.zeros_like(self.ids)
        first[:, 0] = 1
        return {"input_ids": self.ids, "global_attention_mask": first}


def random_led_base(smoke: bool) -> tuple[LEDForConditionalGeneration, Inputs]:
    """Builds layers that change their input without drowning it: wider weights make one token the likeliest."""
    layers, d_model, ffn_dim, vocab_size = (1, 64, 128, 90) if smoke else (6, 768, 3072, 50265)
    config = LEDConfig(
        vocab_size=vocab_size, d_model=d_model, encoder_layers=layers, decoder_layers=layers,
        encoder_ffn_dim=ffn_dim, decoder_ffn_dim=ffn_dim, encoder_attention_heads=d_model // 64 or 1,
        decoder_attention_heads=d_model // 64 or 1, attention_window=1024,
    )  # fmt: skip
    model = LEDForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "shared" in name:
                parameter.normal_()
            elif parameter.dim() == 2 and "lm_head" not in name:  # the head is tied to the embeddings
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5)
    ids = torch.randint(4, vocab_size, (2, 64 if smoke else 512))
    return model, Inputs(ids, ids[:, :64], 4 if smoke else 32)


def measure(model: LEDForConditionalGeneration, inputs: Inputs, **about) -> list[Row]:
    """Measures a row for each of :data:`WEIGHTS`, all read from one checkpoint."""
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
                    weights=weights,
                    weights_mib=mib(loaded),
                    layers_mib=sum(map(mib, linears)),
                    logit_error=((results[0] - expected[0]).norm() / expected[0].norm()).item(),
                    distinct_tokens=results[0].argmax(-1).unique().numel(),
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
    """Returns fp32 logits ``[documents, target, vocab]`` and the greedy tokens ``[documents, new_tokens]``."""
    logits = model(**inputs.encoder, decoder_input_ids=inputs.decoder_ids).logits.float()
    count = inputs.new_tokens
    return logits, model.generate(**inputs.encoder, max_new_tokens=count, min_new_tokens=count)[:, 1:]


def agreement(ours: Tensor, expected: Tensor) -> float:
    return (ours == expected).float().mean().item()


def mib(module: nn.Module) -> float:
    """Returns what the parameters and buffers take, with the scales of quantized ones."""
    return sum(map(_bytes, [*module.parameters(), *module.buffers()])) / 2**20


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: int8 values and scales
        names, _ = tensor.__tensor_flatten__()
        return sum(getattr(tensor, name).nbytes for name in names)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: largest magnitudes and the table of values
    return tensor.nbytes + (state.absmax.nbytes + state.code.nbytes if state else 0)


def markdown(rows: list[Row]) -> str:
    """Returns the README's table and what it was measured on."""
    full = rows[0]
    header = (
        "weights",
        "MiB",
        "of fp32",
        "layers of fp32",
        "logit error",
        "same top-1",
        "same greedy tokens",
    )
    lines = [
        (
            row.weights, f"{row.weights_mib:,.1f}", f"{row.weights_mib / full.weights_mib:.2f}",
            f"{row.layers_mib / full.layers_mib:.2f}", f"{row.logit_error:.1%}", f"{row.top1_agreement:.1%}",
            f"{row.greedy_agreement:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    about = (
        f"led-base's shape with random weights, {full.documents} documents of {full.source_tokens:,} tokens, "
        f"{full.target_tokens} teacher-forced (fp32 finds {full.distinct_tokens} different ones) and "
        f"{full.new_tokens} greedy tokens each. One run on {full.cpu}, "
        f"torch {full.torch}, bitsandbytes {full.bitsandbytes}, torchao {full.torchao}."
    )
    command = f"Made by `python -m benchmarks quantization --threads {full.threads}`."
    return "\n\n".join([table.markdown(header, lines), about, command])


def run(out: Path, *, smoke: bool, threads: int) -> int:
    """Measures into a new CSV, prints the README's table and returns the exit status of a command that does so."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = {
        "threads": threads, "cpu": table.cpu_model(), "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"), "torchao": version("torchao"),
    }  # fmt: skip
    table.write(out, measure(*random_led_base(smoke), **about))
    print(markdown(table.read(out, Row)))
    return 0
