"""Adds ``led finetune`` and its flags to the parser; nothing here imports transformers."""

from __future__ import annotations

import argparse
import re
import textwrap

from led_model.cli.arguments import add_threads_and_quiet, at_least, not_empty, within
from led_model.cli.finetune import run_finetune

_ABOUT = """
An example is a line of a .jsonl file, {"text": "…", "summary": "…"}; --text-field and
--target-field name the two, and --question-field a question, which is read before the
text and whose tokens become global. A text may be a list of strings, the parts of one.
A line that is no example is named on stderr and left out.

The output directory holds, while training goes on and afterwards:
  training_log.jsonl  each logged step once, and each evaluation
  loss.png            both losses and ROUGE, drawn anew every few checkpoints
  checkpoint-N/       the newest checkpoint, and the best one: a model that led and
                      transformers load, with what is needed to go on. Gone at the end
  finetune.json       the settings
  config.json, model.safetensors, the tokenizer's files: the result, at the end: the
                      weights that did best in validation, else the last ones

After an interruption the same command goes on from the newest checkpoint, to the same
weights, on a CPU bit by bit, that an uninterrupted run arrives at; Ctrl-C writes a
checkpoint first. Other settings are refused (but for --checkpointing, --save-every and
--threads): --overwrite begins anew. A directory that holds anything else is never
written into.

exit status: 0 done; 1 the command could not run, 2 its arguments are wrong; 3 done,
without the lines that were no examples; 130 interrupted.
"""

_EXAMPLES = """
  led finetune --train train.jsonl --validation dev.jsonl --model allenai/led-base-16384 --output ./mine
  led finetune --train 'parts/*.jsonl' --validation-split 0.05 --text-field article --target-field abstract \\
      --model ./led --output ./mine --batch-size 2 --accumulate 8 --max-source-length 8192
  led finetune --train qa.jsonl --target-field answer --question-field question --model ./led --output ./qa \\
      --validation qa-dev.jsonl --patience 3 --best-by loss
  led finetune --train train.jsonl --model ./led --output ./mine --dry-run
  led summarize paper.txt --model ./mine
"""


def add_finetune(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "finetune",
        help="train an LED checkpoint on pairs of a text and what to write of it",
        description=textwrap.fill(
            "Trains an LED checkpoint to write a target, such as a summary or an answer, of each text, by "
            "transformers' Trainer (extra `train`). Messages and progress go to stderr.",
            80,
        ),
        epilog=f"examples:{_EXAMPLES}{_ABOUT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_finetune)
    parser.add_argument(
        "--model", required=True, type=not_empty, metavar="DIR_OR_ID",
        help="directory of a checkpoint with its tokenizer, or hub id, to begin from",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit, for a hub id")
    parser.add_argument(
        "--output", required=True, type=not_empty, metavar="DIR",
        help="directory for the result, new or empty, or of the run to go on with",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, in place of an earlier run of led finetune"
    )
    _add_examples(parser)
    _add_training(parser)
    _add_memory(parser)
    _add_validation(parser)
    running = parser.add_argument_group("running")
    running.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add_threads_and_quiet(running)
    running.add_argument(
        "--dry-run", action="store_true",
        help="count examples, tokens and steps, say what was chosen about memory, and stop: only config and "
        "tokenizer are loaded, and --output is not looked at",
    )  # fmt: skip


def _add_examples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("examples")
    group.add_argument(
        "--train", required=True, nargs="+", metavar="FILE.jsonl", help="files, or quoted globs"
    )
    validation = group.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation", nargs="+", metavar="FILE.jsonl",
        help="files, or quoted globs; without validation the last weights are the result",
    )  # fmt: skip
    validation.add_argument(
        "--validation-split", type=within(1e-6, 0.9), metavar="X",
        help="keep this share of --train, chosen by --seed, for validation",
    )  # fmt: skip
    for flag, default, what in (
        ("text", "text", "the text to read"),
        ("target", "summary", "what to write"),
    ):
        group.add_argument(
            f"--{flag}-field", default=default, type=not_empty, metavar="NAME",
            help=f"where a JSON line has {what}; default: {default}",
        )  # fmt: skip
    group.add_argument(
        "--question-field", type=not_empty, metavar="NAME",
        help="where it has a question about the text; default: there is none",
    )  # fmt: skip
    group.add_argument(
        "--max-source-length", type=at_least(8), metavar="N",
        help="longer texts lose their end, in tokens; default: as many as the model reads",
    )  # fmt: skip
    group.add_argument(
        "--max-target-length", type=at_least(3), metavar="N",
        help="longer targets lose their end, and no more is written in validation; default: 256",
    )  # fmt: skip
    group.add_argument(
        "--global-tokens", type=_global_tokens, metavar="RULE",
        help="which tokens see, and are seen by, the whole text: first, question (with --question-field), "
        "separators (<doc-sep>, else </s>), every:K, a number of first tokens, or none; default: question where "
        "there is one, else first, and <doc-sep> besides where the tokenizer has it",
    )  # fmt: skip


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=within(1e-3, 1e4),
        default=3.0,
        metavar="X",
        help="times over all examples; default: 3",
    )
    length.add_argument("--max-steps", type=at_least(1), metavar="N", help="updates of the weights, instead")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="examples read at once; default: 1"
    )
    size.add_argument(
        "--batch-tokens", type=at_least(8), metavar="N",
        help="instead, as many examples as have N tokens to read together, packed",
    )  # fmt: skip
    group.add_argument(
        "--accumulate", type=at_least(1), default=8, metavar="N",
        help="batches whose gradients make one update; default: 8",
    )  # fmt: skip
    group.add_argument(
        "--learning-rate", type=within(0, 1), default=5e-5, metavar="X",
        help="the highest, from which it falls to 0 in a straight line; default: 5e-5",
    )  # fmt: skip
    group.add_argument(
        "--warmup", type=within(0, 1), default=0.05, metavar="X",
        help="share of the updates in which the learning rate rises; default: 0.05",
    )  # fmt: skip
    group.add_argument(
        "--weight-decay", type=within(0, 1), default=0.0, metavar="X", help="of AdamW; default: 0"
    )
    group.add_argument(
        "--label-smoothing", type=within(0, 0.99), default=0.0, metavar="X",
        help="share of each target's probability that is spread over the vocabulary; default: 0",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=within(0, 2**32 - 1, int), default=0, metavar="N",
        help="of dropout, order and --validation-split; default: 0",
    )  # fmt: skip
    group.add_argument(
        "--save-every", type=at_least(1), metavar="N",
        help="updates between checkpoints, besides those of evaluations and of every quarter of an hour; default: 500",
        default=500,
    )  # fmt: skip


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory and speed")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="precision to compute in; weights and sums are float32 either way; default: bfloat16 on a GPU that has "
        "it, else float32",
    )  # fmt: skip
    group.add_argument(
        "--checkpointing", choices=("auto", "on", "off"), default="auto",
        help="compute the layers once more in the backward instead of keeping what they computed: less memory, a "
        "third more time; auto: where it is counted not to fit otherwise",
    )  # fmt: skip
    group.add_argument(
        "--packing", choices=("auto", "on", "off"), default="auto",
        help="store the examples of a batch one after another without padding; auto: where more than one in twenty "
        "tokens would be padding",
    )  # fmt: skip


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--eval-every", type=at_least(1), metavar="N", help="updates between evaluations; default: an epoch"
    )
    group.add_argument(
        "--best-by", choices=("rouge", "loss"), default="rouge",
        help="what chooses the best weights: ROUGE-L of what is written, or the loss, for which nothing is written; "
        "default: rouge",
    )  # fmt: skip
    group.add_argument(
        "--patience",
        type=at_least(1),
        metavar="N",
        help="stop after N evaluations that are no better than the best",
    )
    group.add_argument(
        "--num-beams", type=at_least(1), default=1, metavar="N",
        help="sequences that beam search follows in writing; default: 1, greedy",
    )  # fmt: skip


def _global_tokens(text: str) -> str:
    """Returns the name of a rule for global tokens."""
    if text in ("first", "question", "separators", "none") or re.fullmatch(
        r"every:[1-9]\d{0,7}|\d{1,8}", text
    ):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is no rule; give first, question, separators, every:K, a number or none"
    )
