"""Runs ``led demo``: a long real text through the fused kernels and through transformers' chunked attention."""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from led_kernels.dispatch import choose_backend
from led_kernels.extras import install_extra
from led_model.checkpoint.tensor_names import to_hf_state_dict
from led_model.cli.memory import peak_memory
from led_model.config import LEDConfig
from led_model.modeling.model import LEDForConditionalGeneration
from led_model.terminal import layer_progress, megabytes, seconds, table

_WARM_UP_TOKENS = 64
_FIRST_WORD_ID = 4  # the special tokens come before


@dataclass
class DemoSettings:
    """Holds lengths in tokens, layers of the encoder and of the decoder, and ``window`` as in config.json."""

    tokens: int = 16384
    compare_tokens: int = 4096
    layers: int = 6
    window: int = 1024
    new_tokens: int = 32
    seed: int = 0
    device: str = "cpu"


@dataclass
class Measurement:
    """Holds what was measured of one encoder run; ``peak`` is in bytes above the weights, ``None`` if unknown."""

    tokens: int
    seconds: float
    peak: int | None
    output: np.ndarray  # [tokens, d_model]
    # All new tokens but the first took so long; that one waits for the cross keys.
    decode_seconds: float | None = None


def run_demo(settings: DemoSettings) -> None:
    """Measures, compares and prints. Each measurement gets a fresh process, so that its memory is its own."""
    config = demo_config(settings)
    backend = choose_backend(torch.device(settings.device), torch.float32)
    compared = min(settings.compare_tokens, settings.tokens)
    print(
        f"An LED of led-base's width: {settings.layers}+{settings.layers} layers, d_model {config.d_model}, "
        f"{config.encoder_attention_heads} heads, window {settings.window}; "
        f"{settings.device}, {torch.get_num_threads()} threads, backend {backend!r}.\n"
        "The text is real (Python's help pages), the weights are random: what it writes means nothing.\n",
        flush=True,
    )
    long = _in_own_process(measure_fused, settings, settings.tokens, settings.new_tokens)
    fused = long if compared == settings.tokens else _in_own_process(measure_fused, settings, compared, 0)
    stock = None
    if importlib.util.find_spec("transformers") is not None:
        stock = _in_own_process(measure_transformers, settings, compared)

    columns = {"fused": long, "fused ": fused, "transformers": stock}
    if fused is long:
        del columns["fused "]
    runs = [run for run in columns.values() if run is not None]
    rows = [
        ["input tokens", *(f"{run.tokens:,}" for run in runs)],
        ["encoder time", *(seconds(run.seconds) for run in runs)],
        ["tokens per second", *(f"{run.tokens / run.seconds:,.0f}" for run in runs)],
        ["peak memory above weights", *(megabytes(run.peak) if run.peak else "unknown" for run in runs)],
    ]
    print(table(rows, header=["encoder", *(name for name, run in columns.items() if run is not None)]) + "\n")
    results = _comparison(fused, stock) if stock is not None else []
    if long.decode_seconds:
        speed = f"{(settings.new_tokens - 1) / long.decode_seconds:.1f} tokens per second"
        results.append([f"decoding after {long.tokens:,} tokens", speed])
    if results:
        print(table(results))
    if stock is None or any(run.peak is None for run in runs):
        print(f"\nMissing: transformers to compare with, or psutil for memory; {install_extra('demo')}.")


def _comparison(fused: Measurement, stock: Measurement) -> list[list[str]]:
    """Returns the rows of the table that compares two encoders on one text."""
    difference, largest = np.abs(fused.output - stock.output).max(), np.abs(stock.output).max()
    rows = [
        [
            f"largest difference over {fused.tokens:,} tokens",
            f"{difference:.1e} in values up to {largest:.1f}",
        ],
        ["speed-up over transformers", f"{stock.seconds / fused.seconds:.1f} ×"],
    ]
    if fused.peak and stock.peak:
        rows.append(["memory, as a part of transformers'", f"1/{stock.peak / fused.peak:.1f}"])
    return rows


def demo_config(settings: DemoSettings) -> LEDConfig:
    """Returns led-base's shape, https://huggingface.co/allenai/led-base-16384/blob/main/config.json."""
    return LEDConfig(
        d_model=768,
        encoder_layers=settings.layers,
        decoder_layers=settings.layers,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        attention_window=settings.window,
        max_encoder_position_embeddings=max(16384, settings.tokens),
        max_decoder_position_embeddings=max(1024, settings.new_tokens),
    )


def demo_ids(tokens: int, vocab_size: int) -> Tensor:
    """Returns ``[1, tokens]``: a start token, then Python's help pages, each word a hash that never changes."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    words = re.findall(r"\w+|[^\w\s]", text)
    words *= tokens // len(words) + 1
    size = vocab_size - _FIRST_WORD_ID
    ids = [_FIRST_WORD_ID + zlib.crc32(word.encode()) % size for word in words[: tokens - 1]]
    return torch.tensor([[0, *ids]])


def build_model(settings: DemoSettings) -> LEDForConditionalGeneration:
    """Returns a model with the same weights for the same seed, in every process."""
    torch.manual_seed(settings.seed)
    return LEDForConditionalGeneration(demo_config(settings)).eval().to(settings.device)


def measure_fused(settings: DemoSettings, tokens: int, new_tokens: int) -> Measurement:
    """Encodes ``tokens`` through led_kernels, then decodes ``new_tokens``."""
    model = build_model(settings)

    def encode(input_ids: Tensor) -> Tensor:
        return model.led.encode(input_ids, global_attention_mask=_first_is_global(input_ids))

    label = f"fused, {tokens:,} tokens"
    measurement, input_ids, encoder_hidden_states = _measure(
        encode, model.led.encoder.layers, settings, tokens, label
    )
    if new_tokens > 1:
        times: list[float] = []
        with tqdm(total=new_tokens, desc="decoding", unit="token", leave=False, disable=None) as bar:

            def on_token(next_tokens: Tensor) -> None:
                next_tokens.tolist()  # waits for the device
                times.append(time.perf_counter())
                bar.update()

            # An end that random weights choose means nothing, so that none is allowed.
            model.generate(
                input_ids,
                encoder_hidden_states=encoder_hidden_states,
                on_token=on_token,
                max_new_tokens=new_tokens,
                eos_token_id=None,
            )
        measurement.decode_seconds = times[-1] - times[0]
    return measurement


def measure_transformers(settings: DemoSettings, tokens: int) -> Measurement:
    """Encodes ``tokens`` through transformers' LEDEncoder with the same weights."""
    from transformers import LEDConfig as StockConfig
    from transformers.models.led.modeling_led import LEDEncoder as StockEncoder
    from transformers.utils import logging

    logging.set_verbosity_error()
    ours = build_model(settings)
    stock = StockEncoder(StockConfig(**vars(ours.config)))
    prefix = "led.encoder."
    state = to_hf_state_dict(ours.led.encoder.state_dict(prefix=prefix))
    stock.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    del ours, state
    stock.eval()
    stock.to(settings.device)  # pyrefly: ignore[bad-argument-type]: transformers wraps nn.Module.to without its types

    def encode(input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids)
        return stock(input_ids, mask, global_attention_mask=_first_is_global(input_ids)).last_hidden_state

    label = f"transformers, {tokens:,} tokens"
    return _measure(encode, stock.layers, settings, tokens, label)[0]


def _measure(
    encode: Callable[[Tensor], Tensor], layers: nn.ModuleList, settings: DemoSettings, tokens: int, label: str
) -> tuple[Measurement, Tensor, Tensor]:
    """Returns the measurement of one run of an encoder, its input and its output."""
    input_ids = demo_ids(tokens, demo_config(settings).vocab_size).to(settings.device)
    with torch.no_grad():
        encode(input_ids[:, :_WARM_UP_TOKENS])
        with layer_progress(layers, label), peak_memory(settings.device) as peak:
            start = time.perf_counter()
            encoder_hidden_states = encode(input_ids)
            output = encoder_hidden_states[0].cpu().numpy()  # waits for the device
            elapsed = time.perf_counter() - start
    return Measurement(tokens, elapsed, peak(), output), input_ids, encoder_hidden_states


def _first_is_global(input_ids: Tensor) -> Tensor:
    mask = torch.zeros_like(input_ids)
    mask[:, 0] = 1
    return mask


def _in_own_process(function: Callable[..., Measurement], *args: object) -> Measurement:
    """Calls a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise RuntimeError("the operating system ended the measurement: memory ran out") from None
