"""Parses the arguments of ``led`` and runs the command that they name."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence

import torch

from led_kernels import __version__
from led_model.batch.loading import DEFAULT_NEW_TOKENS, DTYPES
from led_model.cli.arguments import (
    add_batches,
    add_devices,
    add_joining,
    add_long,
    add_output,
    add_running,
    add_sampling,
    at_least,
    not_blank,
    not_empty,
    within,
)
from led_model.cli.convert import add_convert
from led_model.cli.demo import DemoSettings, run_demo
from led_model.cli.engines import run_by_engine
from led_model.cli.finetune_arguments import add_finetune
from led_model.cli.info import run_info
from led_model.cli.process import open_missing_streams, status_of

_ABOUT_DOCUMENTS = """
Documents are .txt and .md files, one document each, and .jsonl files, one a line:
{"id": "a7", "text": "…"}, where the id may be missing and is then the number of the line,
and the text a list of strings, the parts of one document. --engine ray reads
.parquet files, too, a document a row.

With --output each result is on disk as soon as it is there. Documents are done in
another order than they are given in, and a record has its document's id and
source. After an interruption the same command goes on where it stopped: it
leaves out documents whose text the file has a result for. Results of another
model or other settings are never mixed in: --overwrite begins anew. A file that
holds anything else, or that another run writes into, is refused. Without
--output results are printed in the order of the documents: a single one as text,
on a terminal while it is written unless by beams, and several as JSONL; --format
says otherwise.

exit status: 0 all documents are done; 1 the command could not run, 2 its arguments
are wrong; 3 some documents could not be read, or memory did not suffice for them
alone, each is named on stderr, and all the others are done; 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    can_print = sys.stdout is not None
    open_missing_streams()
    args = build_parser().parse_args(argv)
    return status_of(args, can_print)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; a parsed command is a function ``run`` of its arguments."""
    parser = argparse.ArgumentParser(
        prog="led",
        description="Longformer-Encoder-Decoder models on fused attention kernels.",
        epilog="Start with `led demo`: it needs no checkpoint and no network. See `led COMMAND --help`.",
    )
    parser.add_argument("--version", action="version", version=f"led {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_summarize(commands)
    _add_answer(commands)
    _add_classify(commands)
    add_finetune(commands)
    add_convert(commands)
    _add_demo(commands)
    info = commands.add_parser(
        "info", help="say what is installed and which kernels can run here, and why not"
    )
    info.set_defaults(run=lambda args: run_info())
    return parser


def _add_summarize(commands: argparse._SubParsersAction) -> None:
    parser = _document_command(
        commands,
        "summarize",
        "summarize documents with an LED checkpoint",
        "Writes a summary of each document; messages and timings go to stderr.",
        examples="""
  led summarize paper.txt --model ./led-large-16384-arxiv
  pdftotext paper.pdf - | led summarize - --model allenai/led-base-16384 --num-beams 4
  led summarize 'reports/**/*.md' papers.jsonl --output summaries.jsonl --model ./led \\
      --long chunk --max-new-tokens 128
  led summarize many.jsonl --shard 1/4 --output first.jsonl --model ./led    # and 2/4, … elsewhere
  led summarize reports/ --model ./led --long condense --output summaries.jsonl --format text > summaries.txt
  led summarize reports/ --model ./led --dry-run
  led summarize 'papers/*.parquet' --text-field body --model ./led --engine ray --output summaries/
  led summarize monday.txt tuesday.txt --join --model ./primera""",
        chunk="joins their summaries, a line each",
        condense="summarizes these again, until one is left",
    )
    _add_global_tokens(parser)
    _add_generation(parser, "summary", DEFAULT_NEW_TOKENS["summarize"])


def _add_answer(commands: argparse._SubParsersAction) -> None:
    parser = _document_command(
        commands,
        "answer",
        "answer a question from documents",
        "Answers one question from each document. The model reads <s> question </s></s> document </s>, and all "
        "the document sees the question's tokens (global attention). A checkpoint of LEDForQuestionAnswering "
        "finds the answer in the document; any other LED writes it.",
        examples="""
  led answer --question 'Who signed the treaty?' treaty.txt --model ./led-qa
  led answer --question 'What was measured?' papers/ --output measured.jsonl --model ./led-qa --long chunk""",
        chunk="takes the answer with the best score: the mean log-probability of what is written, or the logits of "
        "the span's start and end",
    )
    parser.add_argument("--question", required=True, metavar="TEXT", type=not_blank, help="what to ask")
    _add_generation(parser, "answer", DEFAULT_NEW_TOKENS["answer"])


def _add_classify(commands: argparse._SubParsersAction) -> None:
    parser = _document_command(
        commands,
        "classify",
        "give documents the labels of a classifier",
        "Prints a document's labels with their probabilities, the likeliest first. Needs a checkpoint of "
        "LEDForSequenceClassification.",
        examples="""
  led classify mail.txt --model ./led-spam
  led classify 'inbox/*.txt' --output labels.jsonl --model ./led-spam --batch-size 8""",
        chunk="averages their log-probabilities",
    )
    _add_global_tokens(parser)


def _document_command(
    commands: argparse._SubParsersAction,
    name: str,
    help: str,
    description: str,
    *,
    examples: str,
    chunk: str,
    condense: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a command on documents, with the flags that all of them share, and returns its parser."""
    parser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 80),
        epilog=f"examples:{examples}\n{_ABOUT_DOCUMENTS}\n"
        "LED_KERNELS_BACKEND=torch (or cpu, triton, cuda) chooses the attention kernels by name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_by_engine)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="file in UTF-8, directory (all documents below it), quoted glob with ** for any depth, or - for stdin",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=not_empty,
        metavar="DIR_OR_ID",
        help="directory of a checkpoint with its tokenizer, or hub id",
    )
    parser.add_argument("--revision", help="branch, tag or commit, for a hub id")
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, …; default: cuda where there is one"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision to compute in; default: the checkpoint's own"
    )
    add_output(parser)
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="where a JSON line has its text; default: text"
    )
    parser.add_argument("--jsonl", action="store_true", help="stdin, and files of any name, are JSONL")
    add_long(parser, chunk, condense)
    add_joining(parser)
    add_batches(parser)
    add_devices(parser)
    add_running(parser)
    return parser


def _add_global_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--global-tokens",
        type=at_least(0),
        default=1,
        metavar="N",
        help="the first N tokens see, and are seen by, the whole text; default: 1, as LED was trained",
    )


def _add_generation(parser: argparse.ArgumentParser, noun: str, default: int) -> None:
    group = parser.add_argument_group(
        "writing", "Default of these is what the checkpoint's generation_config says."
    )
    group.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        metavar="N",
        help=f"longest {noun}, in tokens; default: what the checkpoint says, else {default}",
    )
    group.add_argument("--min-new-tokens", type=at_least(0), metavar="N", help=f"shortest {noun}, in tokens")
    group.add_argument(
        "--num-beams", type=at_least(1), metavar="N", help="sequences that beam search follows; 1: greedy"
    )
    group.add_argument(
        "--length-penalty",
        type=within(-50, 50),
        metavar="X",
        help="with beams, above 0 favors long, below 0 short ones",
    )
    group.add_argument(
        "--no-repeat-ngram-size", type=at_least(0), metavar="N", help="no N tokens come twice; 0: they may"
    )
    add_sampling(parser)


def _add_demo(commands: argparse._SubParsersAction) -> None:
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
            type=at_least(1),
            default=default,
            metavar="N",
            help=f"{explanation}; default: {default:,}",
        )
    demo.add_argument(
        "--seed", type=int, default=defaults.seed, help=f"of the weights; default: {defaults.seed}"
    )
    demo.add_argument("--device", type=_device, default=defaults.device, help=f"default: {defaults.device}")
    demo.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    run_demo(
        DemoSettings(**{name: value for name, value in vars(args).items() if name in vars(DemoSettings())})
    )


def _device(text: str) -> str:
    """Returns the name of a device that tensors can be on here."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu, cuda, cuda:1, …") from None
    try:
        if kind == "meta":
            raise argparse.ArgumentTypeError("meta holds no numbers; give cpu or cuda")
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError, ImportError) as error:
        known = "torch sees no GPU" if text.startswith("cuda") else f"torch has no {text!r} here"
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")  # torch goes on for 60 lines
        if "INTERNAL ASSERT" in reason:
            reason = "its backend is not built in"
        raise argparse.ArgumentTypeError(f"{known} ({reason}); give cpu, or install a build for it") from None
    return text
