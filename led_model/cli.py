"""The command ``led``: summarize a text file, show what the kernels do here, say what can run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from led_kernels import BackendUnavailable
from led_model.demo import DemoSettings, run_demo
from led_model.info import run_info
from led_model.model import LEDForConditionalGeneration
from led_model.terminal import layer_progress, seconds
from led_model.tokenizer import LEDTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_NEW_TOKENS = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; an expected failure is one sentence on stderr and 1."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"led {args.command}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        print(
            f"led {args.command}: memory ran out ({error}); shorten the text or change --dtype or --device.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"led {args.command}: interrupted.", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="led",
        description="Longformer-Encoder-Decoder models on fused attention kernels.",
        epilog="Start with `led demo`: it needs no checkpoint and no network. See `led COMMAND --help`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    summarize = commands.add_parser(
        "summarize",
        help="summarize a text file with an LED checkpoint",
        description="Reads a long text and writes its summary to stdout; timings go to stderr.",
        epilog="examples:\n"
        "  led summarize paper.txt --model ./led-large-16384-arxiv\n"
        "  pdftotext paper.pdf - | led summarize - --model allenai/led-base-16384 --max-new-tokens 128\n\n"
        "LED_KERNELS_BACKEND=torch (or cpu, triton, cuda) chooses the attention kernels by name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    summarize.add_argument("file", metavar="FILE", help="text file in UTF-8, or - for stdin")
    summarize.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="directory of a checkpoint with its tokenizer, or hub id",
    )
    summarize.add_argument("--revision", help="branch, tag or commit, for a hub id")
    summarize.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, …; default: cuda where there is one"
    )
    summarize.add_argument(
        "--dtype", choices=_DTYPES, help="precision to compute in; default: the checkpoint's own"
    )
    summarize.add_argument(
        "--max-new-tokens",
        type=_at_least(1),
        metavar="N",
        help=f"longest summary; default: what the checkpoint says, else {_DEFAULT_NEW_TOKENS}",
    )
    summarize.add_argument(
        "--global-tokens",
        type=_at_least(0),
        default=1,
        metavar="N",
        help="the first N tokens see, and are seen by, the whole text; default: 1, as LED was trained",
    )
    summarize.add_argument(
        "--long",
        choices=("error", "truncate"),
        default="error",
        help="what to do with a text longer than the model reads; default: error",
    )
    summarize.set_defaults(run=run_summarize)

    defaults = DemoSettings()
    demo = commands.add_parser(
        "demo",
        help="encode a long text through the kernels and through transformers, and compare",
        description="Takes Python's own help pages as a long text and an LED of led-base's shape with random "
        "weights; encodes the text with the fused kernels and, if transformers is there, with its chunked "
        "attention, and prints difference, time and memory. Needs no checkpoint and no network.",
        epilog="example of a short run:\n  led demo --tokens 4096 --compare-tokens 2048 --layers 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, explanation in (
        ("tokens", "length of the long text"),
        ("compare-tokens", "length of the part that transformers encodes too"),
        ("layers", "layers of the encoder, and of the decoder"),
        ("window", "width of the band, as in config.json"),
        ("new-tokens", "tokens to decode"),
    ):
        default = getattr(defaults, flag.replace("-", "_"))
        demo.add_argument(
            f"--{flag}",
            type=_at_least(1),
            default=default,
            metavar="N",
            help=f"{explanation}; default: {default:,}",
        )
    demo.add_argument(
        "--seed", type=int, default=defaults.seed, help=f"of the weights; default: {defaults.seed}"
    )
    demo.add_argument("--device", type=_device, default=defaults.device, help=f"default: {defaults.device}")
    demo.set_defaults(run=_run_demo)

    info = commands.add_parser(
        "info", help="say what is installed and which kernels can run here, and why not"
    )
    info.set_defaults(run=lambda args: run_info())
    return parser


def run_summarize(args: argparse.Namespace) -> None:
    """``led summarize``."""
    text = _read_text(args.file)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    tokenizer = LEDTokenizer.from_pretrained(args.model, revision=args.revision)
    model = LEDForConditionalGeneration.from_pretrained(
        args.model, dtype=_DTYPES.get(args.dtype), device=device, revision=args.revision
    )
    loaded = time.perf_counter()
    input_ids = _to_input_ids(tokenizer, text, model, args.long).to(device)
    global_attention_mask = torch.zeros_like(input_ids)
    global_attention_mask[:, : args.global_tokens] = 1

    generation = model.generation_config
    if generation.unsupported:
        asked = ", ".join(f"{name}={value}" for name, value in generation.unsupported.items())
        _say(f"the checkpoint asks for {asked}; decoding without it.")
    if args.max_new_tokens is not None:
        generation.max_new_tokens = args.max_new_tokens
    elif generation.max_new_tokens is None and generation.max_length is None:
        generation.max_new_tokens = min(_DEFAULT_NEW_TOKENS, model.config.max_decoder_position_embeddings)

    with torch.no_grad(), layer_progress(model.led.encoder.layers, f"reading {input_ids.shape[1]:,} tokens"):
        encoded = model.led.encode(input_ids, global_attention_mask=global_attention_mask)
        encoded.flatten()[:1].tolist()  # waits for the device
    read = time.perf_counter()
    with tqdm(
        total=generation.length_limit() - 1, desc="writing", unit="token", leave=False, disable=None
    ) as bar:
        summary_ids = model.generate(
            input_ids, torch.ones_like(input_ids), encoded=encoded, on_token=lambda _: bar.update()
        )[0].tolist()
    written = time.perf_counter()
    print(tokenizer.decode(summary_ids, skip_special_tokens=True).strip())
    made = len(summary_ids) - 1
    _say(
        f"loaded in {seconds(loaded - start)}, read {input_ids.shape[1]:,} tokens in "
        f"{seconds(read - loaded)}, "
        f"wrote {made:,} in {seconds(written - read)} ({made / (written - read):.1f} tokens/s)."
    )


def _run_demo(args: argparse.Namespace) -> None:
    run_demo(
        DemoSettings(**{name: value for name, value in vars(args).items() if name in vars(DemoSettings())})
    )


def _read_text(file: str) -> str:
    name = "stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is not there; give a text file, or - for stdin.") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{file} is a directory; give a text file, or - for stdin.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {error.start}; convert it, for instance with iconv."
        ) from None
    if not text.strip():
        raise ValueError(f"{name} holds no text; give one to summarize.")
    return text


def _to_input_ids(
    tokenizer: LEDTokenizer, text: str, model: LEDForConditionalGeneration, long: str
) -> Tensor:
    ids = tokenizer.encode(text)
    limit = model.config.max_encoder_position_embeddings
    if len(ids) > limit:
        if long == "error":
            raise ValueError(
                f"the text has {len(ids):,} tokens but the model reads at most {limit:,}; cut it, "
                "or let --long truncate do so."
            )
        _say(f"reading the first {limit:,} of {len(ids):,} tokens.")
        ids = [*ids[: limit - 1], ids[-1]]  # the end-of-text token stays last
    return torch.tensor([ids])


def _at_least(smallest: int):
    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    parse.__name__ = "int"  # argparse names it in its message
    return parse


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda, cuda:1, …") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU; install a GPU build of torch, or give cpu")
    return text


def _say(message: str) -> None:
    print(f"led: {message}", file=sys.stderr)
