"""Two processes train the models of training_cases together; ``accelerate launch`` starts this with a file for results.

The file gets a dict: for each check what it returned, or the text of its error.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_cases import MODELS, batch, stock_model, trained, trainer_of, weights

STEPS = 3
TRAINER_RUNS = ((0.0, 1), (0.0, 2), (0.1, 2))  # label smoothing, and accumulated batches
GLOBALS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda rank, step: True,
    "mixed": lambda rank, step: (rank + step) % 2 == 0,
    "none": lambda rank, step: False,
}


def share(rank: int, step: int, kind: str) -> dict[str, torch.Tensor]:
    """Returns the two rows of a process at a step, with as many labels as those of the other."""
    first = 4 * (step % 2) + 2 * rank
    return batch(range(first, first + 2), equal=True, has_global=GLOBALS[kind](rank, step))


def train(model: nn.Module, kind: str, wrapped: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Takes a process's part in three steps, and returns the weights afterwards."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for step in range(STEPS):
        optimizer.zero_grad()
        (wrapped or model)(**share(dist.get_rank(), step, kind)).loss.backward()
        optimizer.step()
    return weights(model)


def train_alone(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Takes the steps of both processes in one."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (model(**share(rank, step, kind)).loss / 2).backward()
        optimizer.step()
    return weights(model)


def sharded(model: nn.Module, by_layer: bool, **settings: Any) -> nn.Module:
    if by_layer:
        for layer in (*model.led.encoder.layers, *model.led.decoder.layers):
            fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def ddp(build: Callable[[], nn.Module], kind: str, static_graph: bool) -> dict[str, torch.Tensor]:
    model = build()
    wrapped = DistributedDataParallel(model, static_graph=static_graph, find_unused_parameters=False)
    found = train(model, kind, wrapped)
    other = [None, None]
    dist.all_gather_object(other, found)
    assert all(torch.equal(other[0][name], other[1][name]) for name in found), (
        "the processes have other weights"
    )
    return found


def fsdp(
    build: Callable[[], nn.Module], kind: str, by_layer: bool, **settings: Any
) -> dict[str, torch.Tensor]:
    return train(sharded(build(), by_layer, **settings), kind)


def generate(build: Callable[[], nn.Module], by_layer: bool, **settings: Any) -> dict[str, Any]:
    """Generates before training, a different number of tokens in each process, and trains; and generates again."""
    model = sharded(build(), by_layer, **settings).eval()
    inputs = {name: x for name, x in batch(range(2)).items() if name not in ("labels", "decoder_input_ids")}

    def tokens() -> list[torch.Tensor]:
        limit = 5 + 4 * dist.get_rank()
        found = [model.generate(**inputs, max_new_tokens=limit, num_beams=beams) for beams in (1, 2)]
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "they stay whole"
        return found

    return {"before": tokens(), "weights": train(model, "mixed"), "after": (model.eval(), tokens())[1]}


def main(results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    bf16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    checks: dict[str, Callable[[], Any]] = {}
    for name, build in MODELS.items():
        for kind in GLOBALS:
            for static in (False, True):
                checks[f"ddp {name} {kind} {static}"] = lambda b=build, k=kind, s=static: ddp(b, k, s)
        for by_layer in (False, True):
            for kind in ("all", "mixed"):
                checks[f"fsdp {name} {kind} {by_layer}"] = lambda b=build, k=kind, y=by_layer: fsdp(b, k, y)
            checks[f"fsdp-bf16 {name} {by_layer}"] = lambda b=build, y=by_layer: fsdp(b, "all", y, **bf16)
            checks[f"generate {name} {by_layer}"] = lambda b=build, y=by_layer: generate(b, y)
        checks[f"generate-bf16 {name}"] = lambda b=build: generate(b, by_layer=True, **bf16)
        for smoothing, steps in TRAINER_RUNS:
            settings = {
                "label_smoothing_factor": smoothing,
                "per_device_train_batch_size": 2 // steps,
                "gradient_accumulation_steps": steps,
                "average_tokens_across_devices": True,
                "ddp_find_unused_parameters": False,
            }
            checks[f"trainer {name} {smoothing} {steps}"] = lambda b=build, s=settings: by_trainer(b, s)
        apart = {"per_device_train_batch_size": 2, "average_tokens_across_devices": False, "equal": True}
        checks[f"trainer-apart {name}"] = lambda b=build, s=apart: by_trainer(b, s)
    found: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # the other checks have their results
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    if dist.get_rank() == 0:
        found |= {f"alone {kind}": train_alone(stock_model(), kind) for kind in GLOBALS}
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()


def by_trainer(build: Callable[[], nn.Module], settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return trained(trainer_of(build(), directory, **settings))


if __name__ == "__main__":
    main(sys.argv[1])
