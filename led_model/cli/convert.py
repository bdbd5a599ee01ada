"""Runs ``led convert``, which makes a checkpoint for long texts of one for short texts."""

from __future__ import annotations

import argparse
import textwrap

from led_model.batch.loading import DTYPES
from led_model.cli.arguments import at_least, not_empty, within
from led_model.conversion.convert import convert_checkpoint
from led_model.terminal import log, megabytes

_DESCRIPTION = (
    "Writes an LED made of a BART, or a Longformer made of a RoBERTa, XLM-RoBERTa, CamemBERT or BERT, with the head "
    "that it has; and an LED or a Longformer with more positions than it had. Positions that the source lacks are "
    "copies of its own, repeated, and global attention starts with copies of the local projections. Texts that the "
    "window covers give the source's results at once; longer ones want training. transformers is not needed."
)
_positions = within(1, 2**24, int)  # more would not fit into a table
_EPILOG = """examples:
  led convert facebook/bart-base --output led-16k
  led convert facebook/bart-large-cnn --output led-cnn --max-positions 8192 --attention-window 512
  led convert FacebookAI/roberta-base --output longformer-4k
  led convert ./bert-for-mail --output mail-8k --max-positions 8192 --dtype bfloat16
  led convert allenai/led-base-16384 --output led-32k --max-positions 32768

The result is a directory that transformers reads and, if it is an LED, led_model and the
other commands. It is there whole or not at all.

exit status: 0 it is written; 1 it could not be made, and nothing is written; 2 the
arguments are wrong; 130 interrupted.
"""


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of ``led``."""
    parser = commands.add_parser(
        "convert",
        help="make an LED or a Longformer of a BART, RoBERTa or BERT, or lengthen one",
        description=textwrap.fill(_DESCRIPTION, 80),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=not_empty, help="directory of a checkpoint, or hub id"
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=not_empty, help="directory to make")
    parser.add_argument(
        "--max-positions",
        type=_positions,
        metavar="N",
        help="tokens that a text may have; default: 16384 for an LED made of a BART, 4096 for a Longformer made of "
        "another model, else as many as the source's",
    )
    parser.add_argument(
        "--max-decoder-positions",
        type=_positions,
        metavar="N",
        help="tokens that an LED may write; default: as many as the source",
    )
    parser.add_argument(
        "--attention-window",
        type=_even,
        metavar="W",
        help="width of the band, as in config.json: a token sees W/2 to either side; default: the source's, or as many "
        "tokens as it reads",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the source's")
    parser.add_argument("--revision", help="branch, tag or commit, for a hub id")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a checkpoint that is at --output, once all is written",
    )
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> None:
    """Converts, and prints what was made."""
    done = convert_checkpoint(
        args.source,
        args.output,
        max_positions=args.max_positions,
        max_decoder_positions=args.max_decoder_positions,
        attention_window=args.attention_window,
        dtype=DTYPES.get(args.dtype),
        revision=args.revision,
        overwrite=args.overwrite,
    )
    for note in done.notes:
        log(note, "led convert")
    if not done.has_tokenizer:
        log(f"{args.source} has no tokenizer's files; copy them there.", "led convert")
    reach = done.reach
    widths = sorted(set(reach.windows))
    for name, value in {
        "written": args.output,
        "model": done.architecture,
        "positions": f"{reach.positions:,}, the source has {reach.old_positions:,}",
        "attention window": " to ".join(f"{width:,}" for width in (widths[0], widths[-1])[: len(widths)]),
        "as the source": f"up to {reach.exact_length:,} tokens",
        "weights": megabytes(done.num_bytes),
    }.items():
        print(f"{name:<16}  {value}")


def _even(text: str) -> int:
    """Returns the width of a band."""
    value = at_least(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"{text} is odd, and the band has as many tokens on either side")
    return value
