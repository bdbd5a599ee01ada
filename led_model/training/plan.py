"""Decides how a run goes: its updates, and what it does to save memory and time."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from led_model.config import LEDConfig
from led_model.data.batching import LengthBatchSampler, TokenBatchSampler
from led_model.training.memory import activation_bytes, count_parameters, free_bytes, has_room, model_bytes

_WORTH_PACKING = 1.05  # padded tokens a token


@dataclass
class Plan:
    """Holds the decisions of a run, and why they were taken.

    ``batches`` are those of an epoch, ``steps`` the updates of the run, ``eval_every`` the updates between evaluations,
    ``None`` without validation.
    """

    batches: LengthBatchSampler | TokenBatchSampler
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    eval_every: int | None
    packing: bool
    checkpointing: bool
    about_packing: str
    about_memory: str


def make_plan(
    args: Namespace,
    lengths: np.ndarray,
    has_validation: bool,
    config: LEDConfig,
    chosen: Mapping[str, Any],
) -> Plan:
    """Returns the plan of a run.

    Args:
        args: of ``led finetune``, with ``device`` and ``dtype`` chosen.
        lengths: of the sources and targets to train on, int64 ``[examples, 2]``.
        chosen: ``checkpointing`` of the run to go on with, else empty, as the memory that is free may be another now.
    """
    batches = make_batches(args, lengths)
    of_batches = [lengths[batch] for batch in batches]  # each int64 [documents, 2]
    padded = np.array([len(rows) * rows.max(0) for rows in of_batches])
    packed = np.array([rows.sum(0) for rows in of_batches])
    factor = float(padded[:, 0].sum() / packed[:, 0].sum())
    packing = _choice(args.packing, factor > _WORTH_PACKING or args.batch_tokens is not None)
    sources, targets = (packed if packing else padded).max(0).tolist()
    dtype: torch.dtype = getattr(torch, args.dtype)
    kept, kept_less = (
        activation_bytes(config, sources, targets, dtype, checkpointing, args.label_smoothing > 0)
        for checkpointing in (False, True)
    )
    model, free = model_bytes(count_parameters(config)), free_bytes(args.device)
    checkpointing = _choice(args.checkpointing, chosen.get("checkpointing", not has_room(kept, model, free)))

    steps_per_epoch = -(-len(batches) // args.accumulate)
    steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    return Plan(
        batches=batches,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=math.ceil(args.warmup * steps),
        eval_every=(args.eval_every or steps_per_epoch) if has_validation else None,
        packing=packing,
        checkpointing=checkpointing,
        about_packing=f"packing {_on(packing)}: without it batches would be {100 * (1 - 1 / factor):.0f} % padding",
        about_memory=f"checkpointing {_on(checkpointing)}: the largest batch, {sources:,} tokens to read and "
        f"{targets:,} to write, keeps about {_size(kept)} without it and {_size(kept_less)} with it, beside "
        f"{_size(model)} for weights, gradients and optimizer; "
        f"{'nothing tells how much' if free is None else _size(free)} is free",
    )


def make_batches(args: Namespace, lengths: np.ndarray) -> LengthBatchSampler | TokenBatchSampler:
    """Returns what the batches of each epoch are; lengths as :func:`make_plan` takes them.

    Raises:
        ValueError: when an example is longer than ``--batch-tokens``.
    """
    if args.batch_tokens is None:
        return LengthBatchSampler(lengths[:, 0], args.batch_size, seed=args.seed)
    longest = int(lengths[:, 0].max())
    if longest > args.batch_tokens:
        raise ValueError(
            f"--batch-tokens is {args.batch_tokens:,} and the longest text has {longest:,} tokens; raise it, or cut "
            "texts by --max-source-length."
        )
    return TokenBatchSampler(lengths[:, 0], args.batch_tokens, seed=args.seed)


def _choice(given: str, automatic: bool) -> bool:
    return automatic if given == "auto" else given == "on"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
