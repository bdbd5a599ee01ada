"""Adds the flags that commands on documents share, and parses their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from led_model.batch.input_shards import SHARD_ROWS
from led_model.batch.scheduling import ROWS
from led_model.cli.shards import shard


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns a parser of integers that are not below ``smallest``."""
    return within(smallest, 2**31 - 1, int)


def within(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """Returns a parser of numbers from ``low`` to ``high``, both inclusive."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value < low and high == 2**31 - 1:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        if not low <= value <= high:  # true for NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into its message
    return parse


def not_empty(text: str) -> str:
    """Returns a name, which must not be blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def not_blank(text: str) -> str:
    """Returns a question, which must be text that can be encoded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a question is not blank")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("a question is UTF-8, and this has half of a character") from None
    return text


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how results are written."""
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="append results here, and resume from here; with --engine ray a directory",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="let the first result replace those that --output holds, of this command or another",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl"),
        help="print results in this form, several texts under a line with their document's name; with --output, "
        "which is always JSONL, print them besides, those of earlier runs too",
    )


def add_long(parser: argparse.ArgumentParser, chunk: str, condense: str | None) -> None:
    """Adds ``--long``.

    Args:
        chunk, condense: help on what these choices do; without ``condense`` there is no such choice.
    """
    explanation = (
        "what to do with a document longer than the model reads: error (default) leaves it out, truncate reads its "
        "beginning, chunk reads it in pieces, cut between paragraphs or sentences where possible, and "
        f"{chunk}"
    )
    choices = ["error", "truncate", "chunk"]
    if condense is not None:
        explanation += f", condense {condense}"
        choices.append("condense")
    parser.add_argument("--long", choices=choices, default="error", help=explanation)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sampling."""
    group = parser.add_argument_group(
        "chance", "Nothing is left to chance unless this or generation_config asks for it."
    )
    group.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="draw each token by its probability, or always take the likeliest",
    )
    group.add_argument(
        "--temperature",
        type=within(1e-3, 1e3),
        metavar="X",
        help="below 1 the likely tokens get likelier, above 1 less so",
    )
    group.add_argument(
        "--top-k", type=at_least(0), metavar="N", help="draw from the N likeliest tokens; 0: from all"
    )
    group.add_argument(
        "--top-p",
        type=within(1e-6, 1),
        metavar="X",
        help="draw from the likeliest tokens that together have the probability X",
    )
    group.add_argument(
        "--seed",
        type=within(-(2**63), 2**63 - 1, int),
        metavar="N",
        help="of the chances, the same for each batch: with --batch-size 1, which is the default of a run with a "
        "seed, a document's text is the same in every run that has this seed",
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which documents are read at once, and by which run."""
    group = parser.add_argument_group(
        "many documents", "Documents are read ahead, and those of similar length at once, a batch."
    )
    group.add_argument(
        "--batch-tokens",
        type=at_least(1),
        metavar="N",
        help="tokens of a batch, padding included; a longer document is read alone. More are faster on a GPU and take "
        "more memory. A batch for which it does not suffice is halved, and a document for which it does not is "
        "reported. Default: the longest input of the model, or with --batch-size that many of these",
    )
    group.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help=f"documents (or pieces) of a batch at most; 1: one after another, in the order given. Default: {ROWS}",
    )
    group.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="read the I-th of N equal shares of the documents, I from 1 to N: so N runs with the same inputs, each "
        "with an --output of its own, do the work together. Files are dealt out in turn, and so are lines of JSONL, "
        "which the other runs do not parse; an id that is in two shares is not noticed. The outputs, one after "
        "another in a file, are that of a single run",
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where several documents are read at once."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--devices",
        type=at_least(1),
        metavar="N",
        help="read documents in N processes at once, each with a model of its own: on a GPU each, or where there is "
        "none, or with --device cpu, with --threads or an equal share of the processors. A process that dies is "
        "replaced, and the documents that it had in hand are read once more, each by itself, before one is reported "
        "as failed. Default: 1; with --engine ray, where N is a limit: a GPU each, or --threads processors (4), of "
        "which one a node is left over",
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: read documents in actors of Ray, on this machine or a cluster. Inputs are files that all nodes "
        "can read, Parquet too, and are cut into shards; --output is a directory, in which a shard's results are a "
        "file, results-000007.jsonl, with errors-000007.jsonl beside it if documents failed. A file is there when it "
        "is complete: the same command makes those that are missing, and a killed actor, node or command loses and "
        "repeats nothing but the shards it had in hand. Documents that failed are tried again if both files are "
        "removed. Needs the extra ray",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster, for --engine ray; default: RAY_ADDRESS, or else a Ray on this machine for this run",
    )
    group.add_argument(
        "--shard-rows",
        type=at_least(1),
        metavar="N",
        help="lines of JSONL, rows of Parquet or files of text that make a shard of --engine ray; default: "
        f"{SHARD_ROWS}. An id "
        "that is in two shards is not noticed",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how the command runs."""
    group = parser.add_argument_group("running")
    smaller = group.add_mutually_exclusive_group()
    for bits, kind in ((4, "NF4, by bitsandbytes"), (8, "int8, by torchao")):
        smaller.add_argument(
            f"--load-in-{bits}bit",
            action="store_true",
            help=f"keep the layers' weights in {bits} bits ({kind}): less memory, and slightly other results",
        )
    add_threads_and_quiet(group)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="count documents and tokens, name those that are longer than the model reads, and stop: only config "
        "and tokenizer are loaded, and --output is not looked at",
    )


def add_threads_and_quiet(group: argparse._ArgumentGroup) -> None:
    """Adds ``--threads`` and ``--quiet``."""
    group.add_argument(
        "--threads",
        type=within(1, 1024, int),
        metavar="N",
        help="of the processor, for each process; default: one a core",
    )
    group.add_argument(
        "--quiet", action="store_true", help="say nothing on stderr but what failed, and draw no bars"
    )


def add_joining(parser: argparse.ArgumentParser) -> None:
    """Adds ``--join``."""
    parser.add_argument(
        "--join",
        action="store_true",
        help="read all documents as the parts of one, in the order given, as a JSON line is read whose text is a "
        "list of strings. Between parts stands <doc-sep> with global attention where the tokenizer has it "
        "(PRIMERA), else a blank line",
    )
