"""Runs ``--dry-run``, which says how much there is to read, and what is too long, without loading a model."""

from __future__ import annotations

from argparse import Namespace

from led_model.batch.documents import Document, Source, Unreadable
from led_model.batch.pieces import Reader
from led_model.batch.tasks import longest_input
from led_model.checkpoint.checkpoint import read_config
from led_model.checkpoint.hub import checkpoint_files
from led_model.cli.commands import DONE, SOME_FAILED, find_documents
from led_model.cli.joined import Joined
from led_model.cli.loading import task_spec
from led_model.cli.ray_engine import find_shards
from led_model.terminal import log_error, quiet
from led_model.tokenization.tokenizer import LEDTokenizer


def count_documents(args: Namespace) -> int:
    """Prints the numbers of documents and tokens and each document longer than the model reads.

    Returns:
        The exit status that the run itself would have, as far as reading decides it.
    """
    if args.engine == "ray":
        _, shards, problems = find_shards(args)
        sources: list[Source | Joined] = [source for shard in shards for source in shard]
    else:
        sources, problems = find_documents(args)
    reader = _reader(args)
    failed = 0
    lengths: list[int] = []
    for problem in problems:
        log_error(problem, f"led {args.command}")
        failed += 1
    for source in sources:
        for document in source.read():
            try:
                if isinstance(document, Unreadable):
                    raise ValueError(document.message)
                tokens, pieces = _measure(reader, document, args.long)
            except ValueError as error:
                log_error(str(error), f"led {args.command}")
                failed += 1
                continue
            lengths.append(tokens)
            if tokens > reader.limit:
                fate = {
                    "error": "would be left out",
                    "truncate": f"the first {reader.limit:,} would be read",
                    "chunk": f"would be read in {pieces} pieces",
                    "condense": f"would be read in {pieces} pieces, and their summaries again",
                }[args.long]
                print(f"{document.name} has {tokens:,} tokens: {fate}.")
    too_long = sum(length > reader.limit for length in lengths)
    print(
        f"{len(lengths):,} document{'s' * (len(lengths) != 1)}, {sum(lengths):,} tokens, "
        f"at most {max(lengths, default=0):,} in one; "
        f"{too_long:,} longer than the {reader.limit:,} that the model reads, {failed:,} that cannot be read."
    )
    return SOME_FAILED if failed or (too_long and args.long == "error") else DONE


def _reader(args: Namespace) -> Reader:
    config, _ = read_config(checkpoint_files(args.model, args.revision), args.model)
    writes = args.command == "summarize" or (args.command == "answer" and not task_spec(args).finds_answers())
    return Reader(
        LEDTokenizer.from_pretrained(args.model, revision=args.revision),
        longest_input(config, writes),
        "chunk",
        question=getattr(args, "question", None),
    )


def _measure(reader: Reader, document: Document, long: str) -> tuple[int, int]:
    """Returns how many tokens a document has, special ones included, and in how many pieces it would be read."""
    if long in ("error", "truncate"):
        return reader.count(document), 1
    with quiet():  # count_documents says how it would be cut
        pieces = reader.pieces(document)
    around = len(pieces[0].prefix) + len(pieces[0].suffix)
    return around + sum(len(piece.ids) for piece in pieces), len(pieces)
