"""Runs ``led finetune``, up to where transformers' Trainer is needed (``led_model/training/``)."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from led_model.batch.loading import DEFAULT_NEW_TOKENS
from led_model.batch.tasks import check_vocabulary, longest_input
from led_model.checkpoint.checkpoint import read_config
from led_model.checkpoint.fingerprint import fingerprint
from led_model.checkpoint.hub import checkpoint_files
from led_model.cli.commands import DONE, INTERRUPTED, SOME_FAILED, set_threads
from led_model.cli.examples import PROG, ExampleEncoder, ExampleSource, find_examples
from led_model.cli.finetune_checks import check_arguments, check_enough, length_within
from led_model.data.global_tokens import EveryKthToken
from led_model.terminal import log, log_error, no_bars, quiet
from led_model.tokenization.tokenizer import LEDTokenizer
from led_model.training.plan import Plan, make_plan
from led_model.training.run_directory import LOG, PLOT, RunDirectory
from led_model.training.store import Examples, ExampleStore

if TYPE_CHECKING:
    from led_model.training.run import Outcome, Run

# With other values of these, a run would arrive at other weights, or choose others among them.
_COMPARED = (
    "epochs", "max_steps", "batch_size", "batch_tokens", "accumulate", "learning_rate", "warmup", "weight_decay",
    "label_smoothing", "seed", "device", "dtype", "packing", "eval_every", "best_by", "patience",
    "num_beams", "max_source_length", "max_target_length", "global_tokens", "validation_split",
)  # fmt: skip


def run_finetune(args: Namespace) -> int:
    """Trains a model, or says what a training would do; returns the exit status."""
    with ExitStack() as stack:
        stack.enter_context(quiet(args.quiet))
        set_threads(args.threads)
        check_arguments(args)
        task = _Task(args)
        if args.dry_run:
            return task.count()
        directory = stack.enter_context(RunDirectory(args.output))
        return task.train(directory)


@dataclass
class _Task:
    """Prepares a training: files, tokenizer and examples."""

    args: Namespace

    def __post_init__(self) -> None:
        args = self.args
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        has_bfloat16 = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float32")
        self.config, _ = read_config(checkpoint_files(args.model, args.revision), args.model)
        self.tokenizer = LEDTokenizer.from_pretrained(args.model, revision=args.revision)
        check_vocabulary(self.tokenizer, self.config)
        self.max_target_length = length_within(
            "--max-target-length", args.max_target_length, self.config.max_decoder_position_embeddings,
            DEFAULT_NEW_TOKENS["summarize"],
        )  # fmt: skip
        self.encoder = ExampleEncoder(
            self.tokenizer,
            length_within(
                "--max-source-length", args.max_source_length, longest_input(self.config, writes=True)
            ),
            self.max_target_length,
        )
        fields = (args.text_field, args.target_field, args.question_field)
        self.train_sources = find_examples(args.train, "--train", *fields)
        self.validation_sources = (
            find_examples(args.validation, "--validation", *fields) if args.validation else []
        )

    @property
    def has_validation(self) -> bool:
        return bool(self.validation_sources) or self.args.validation_split is not None

    def count(self) -> int:
        """Prints what a training would do."""
        lengths = self._counted(self.train_sources, "training")
        validation = self._counted(self.validation_sources, "validation")
        if self.args.validation_split is not None:
            chosen, kept = self._split(len(lengths))
            lengths, validation = lengths[chosen], lengths[kept]
            print(f"{len(kept):,} of them are kept for validation.")
        check_enough(len(lengths), len(validation), self.has_validation)
        plan = make_plan(self.args, lengths, self.has_validation, self.config, {})
        for line in _described(plan, self.args):
            print(f"{line}.")
        return SOME_FAILED if self.encoder.failed else DONE

    def train(self, directory: RunDirectory) -> int:
        """Trains, beginning or going on, and prints where the result is."""
        args, settings = self.args, self._settings()
        is_new = args.overwrite or directory.settings is None
        if not is_new:
            directory.check_settings(settings)
            if directory.is_finished:
                directory.keep_checkpoints([])
                log(f"{args.output} is finished; give --overwrite to begin it anew.", PROG)
                return DONE
        train, validation = (
            self._stored(sources, what, directory)
            for sources, what in ((self.train_sources, "training"), (self.validation_sources, "validation"))
        )
        examples = {
            "the examples to train on": train.store.fingerprint,
            "the examples to validate on": validation.store.fingerprint,
        }
        if args.validation_split is not None:
            chosen, kept = self._split(len(train))
            train, validation = Examples(train.store, chosen), Examples(train.store, kept)
        check_enough(len(train), len(validation), self.has_validation)
        if not is_new:
            directory.check_settings(examples)
        earlier = {} if is_new or directory.settings is None else directory.settings["chosen"]
        plan = make_plan(args, train.lengths, self.has_validation, self.config, earlier)
        if is_new:
            chosen = {"checkpointing": plan.checkpointing}
            directory.begin({**settings, **examples, "chosen": chosen})
        for line in _described(plan, args):
            log(f"{line}.", PROG)
        return self._run(plan, directory, train, validation)

    def _run(self, plan: Plan, directory: RunDirectory, train: Examples, validation: Examples) -> int:
        Run = _import_run()
        run = Run(
            args=self.args,
            plan=plan,
            directory=directory,
            tokenizer=self.tokenizer,
            train=train,
            validation=validation if self.has_validation else None,
            max_target_length=self.max_target_length,
            global_tokens=_global_tokens(self.args, self.tokenizer),
            log=lambda line: log(line, PROG),
            no_bars=no_bars(),
        )
        try:
            outcome = run.finish()
        except KeyboardInterrupt:
            return self._interrupted(directory, plan)
        if outcome.signal is not None:
            return self._interrupted(directory, plan)
        self._print(outcome)
        return SOME_FAILED if self.encoder.failed else DONE

    def _interrupted(self, directory: RunDirectory, plan: Plan) -> int:
        step = directory.latest_step
        kept = (
            "no checkpoint yet" if step is None else f"a checkpoint after update {step:,} of {plan.steps:,}"
        )
        log_error(f"interrupted; {self.args.output} has {kept}. Give the same command again to go on.", PROG)
        return INTERRUPTED

    def _print(self, outcome: Outcome) -> None:
        from led_model.training.progress import describe

        output, best = self.args.output, outcome.best
        which = (
            "the last weights" if best is None else f"those after update {best['step']:,}: {describe(best)}"
        )
        print(f"trained in {outcome.step:,} updates; {output} holds {which}.")
        print(f"{os.path.join(output, LOG)} has the losses, {os.path.join(output, PLOT)} draws them.")
        command = "summarize FILE" if self.args.question_field is None else "answer FILE --question TEXT"
        print(f"next: led {command} --model {output} --max-new-tokens {self.max_target_length}")

    def _settings(self) -> dict[str, Any]:
        """Returns what the weights depend on, beside the examples."""
        given = {f"--{name.replace('_', '-')}": getattr(self.args, name) for name in _COMPARED}
        return {"model's fingerprint": fingerprint(self.args.model, self.args.revision), **given}

    def _split(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the examples to train on, and of those kept for validation, both ascending."""
        order = np.random.default_rng(self.args.seed).permutation(count)
        kept = max(1, round(self.args.validation_split * count))
        return np.sort(order[kept:]), np.sort(order[:kept])

    def _counted(self, sources: Sequence[ExampleSource], what: str) -> np.ndarray:
        """Prints how many examples and tokens there are, and returns their lengths, int64 ``[examples, 2]``."""
        rows, cut, cut_targets = [], 0, 0
        for example in self.encoder.encoded(sources, f"{what} examples"):
            rows.append((len(example.input_ids), len(example.labels)))
            cut += example.is_cut
            cut_targets += example.is_target_cut
        lengths = np.array(rows, np.int64).reshape(-1, 2)
        if sources:
            print(
                f"{len(rows):,} {what} examples, {lengths[:, 0].sum():,} tokens to read, at most "
                f"{lengths[:, 0].max(initial=0):,} in one, and {lengths[:, 1].sum():,} to write; {cut:,} texts and "
                f"{cut_targets:,} targets lose their end."
            )
        return lengths

    def _stored(self, sources: Sequence[ExampleSource], what: str, directory: RunDirectory) -> Examples:
        """Returns all examples of ``sources``."""
        with directory.writing():
            store, cut, cut_targets = ExampleStore(directory.path), 0, 0
            for example in self.encoder.encoded(sources, f"{what} examples"):
                store.append(example.input_ids, example.labels)
                cut += example.is_cut
                cut_targets += example.is_target_cut
            store.seal()
        for number, kind, longest in (
            (cut, "texts", self.encoder.max_source_length),
            (cut_targets, "targets", self.max_target_length),
        ):
            if number:
                of_all = f"{number:,} of {len(store):,} {what} {kind}"
                log(f"{of_all} are longer than {longest:,} tokens and lose their end.", PROG)
        return Examples(store, np.arange(len(store)))


def _import_run() -> type[Run]:
    """Imports transformers, and what that imports, without their warnings to programmers."""
    logging.disable(logging.WARNING)
    try:
        from led_model.training.run import Run
    finally:
        logging.disable(logging.NOTSET)
    return Run


def _global_tokens(args: Namespace, tokenizer: LEDTokenizer) -> Any:
    """Returns the rule of ``--global-tokens`` as the collator takes it."""
    rule = args.global_tokens
    if rule is None:
        first = "first" if args.question_field is None else "question"
        return first if tokenizer.doc_sep_token_id is None else [first, "separators"]
    if rule.startswith("every:"):
        return EveryKthToken(int(rule.removeprefix("every:")))
    return int(rule) if rule.isdecimal() else rule


def _described(plan: Plan, args: Namespace) -> list[str]:
    """Returns what a training will do, without full stops."""
    size = f"{args.batch_size} examples" if args.batch_tokens is None else f"{args.batch_tokens:,} tokens"
    lines = [
        f"{plan.steps:,} updates of {args.accumulate} batches of at most {size}, {plan.steps_per_epoch:,} an "
        f"epoch, in {args.dtype} on {args.device}"
    ]
    if plan.eval_every is not None:
        lines.append(f"an evaluation every {plan.eval_every:,} updates")
    return [*lines, plan.about_packing, plan.about_memory]
