"""Runs ``led summarize``, ``led answer`` and ``led classify``, from their flags to the exit status."""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import ExitStack

import torch

from led_model.batch.documents import Source
from led_model.cli.devices import check_devices
from led_model.cli.finding import SUFFIXES, find_sources
from led_model.cli.joined import Joined
from led_model.cli.loading import made_by
from led_model.cli.results import ResultFile
from led_model.cli.run import Run
from led_model.terminal import log, log_error, quiet

DONE, SOME_FAILED, INTERRUPTED = 0, 3, 130


def run_on_documents(args: Namespace) -> int:
    """Runs ``args.command`` over all documents that ``args`` names; returns the exit status."""
    with ExitStack() as stack:
        stack.enter_context(quiet(args.quiet))
        set_threads(args.threads)
        check_revision(args)
        if args.devices is not None:
            check_devices(args)
        sources, problems = find_documents(args)
        results = None
        if args.output is not None:
            question = getattr(args, "question", None)
            results = stack.enter_context(ResultFile(args.output, made_by(args), question, args.overwrite))
        if results is not None and results.count:
            log(f"{args.output} holds {results.count:,} results already; these documents are left out.")
        run = Run(args, results, sources, problems)
        stack.enter_context(run.bar)
        try:
            run.work()
        except KeyboardInterrupt:
            run.bar.close()  # it would overwrite the message
            if results is None or results.count == 0:
                raise
            log_error(
                f"interrupted; {args.output} holds {results.count:,} results. Give the same command again to go "
                "on with the others.",
                f"led {args.command}",
            )
            return INTERRUPTED
        if results is not None and results.count:
            results.check_unchanged()
        if run.renamed:
            log(
                f"{run.renamed:,} of the results in {args.output} stand under names that their documents had before, "
                "which have the same text."
            )
        return SOME_FAILED if run.failed else DONE


def find_documents(args: Namespace) -> tuple[list[Source | Joined], list[str]]:
    """Returns where the documents are, and a sentence on each input that names none.

    With ``--join`` they are one, and with ``--shard`` those of this run.

    Raises:
        ValueError: for ``--join`` with ``--shard``, and an output that would be read.
    """
    if args.shard is not None and args.join:
        raise ValueError(
            "--join makes one document, which --shard cannot deal out; leave one of the two out."
        )
    if args.shard is not None and args.output is not None:
        args.shard.check_output(args.output, args.inputs)
    sources, problems = find_sources(
        args.inputs,
        jsonl=args.jsonl,
        text_field=args.text_field,
        leave_out=args.output,
        suffixes=(*SUFFIXES, ".parquet") if args.engine == "ray" else SUFFIXES,
    )
    if args.shard is not None:
        sources = args.shard.own(sources)
    if not args.join:
        return list(sources), problems
    return [] if problems else [Joined(sources)], problems


def check_revision(args: Namespace) -> None:
    """Checks that a revision is not of a directory.

    Raises:
        ValueError: when it is.
    """
    if args.revision is not None and os.path.isdir(args.model):
        raise ValueError(f"--revision is for hub ids and {args.model} is a directory; leave it out.")


def set_threads(wanted: int | None) -> None:
    """Makes torch use ``wanted`` threads, or as many as there are processors."""
    if wanted is None:
        return
    there = os.cpu_count() or wanted
    if wanted > there:
        log(f"--threads is {wanted} and there are {there} processors, which are all used.")
    torch.set_num_threads(min(wanted, there))
