"""Four ranks train and generate by models whose documents are split over them, beside data parallelism."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from led_kernels.distributed import context_parallel
from led_kernels.hf import apply_led_kernels
from led_model import LEDConfig, LEDForConditionalGeneration
from tests.distributed.compare import relative_differences
from tests.distributed.processes import run_checks
from tests.model.small import VOCAB_SIZE, random_inputs, randomize, small_config

CONFIG = small_config(3)
SOURCE, TARGET = 61, 9
MODELS = ("drop-in", "led_model")
WRAPPERS = ("ddp", "ddp accumulated", "fsdp", "fsdp by layer", "flattened")
HEADS = ("LongformerForSequenceClassification", "LongformerForMaskedLM", "LongformerForQuestionAnswering")


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a model with weights that are the same at each call.

    In fp64 they are so large that attention is far from uniform. In fp32 they are those that training begins with: with
    the larger ones, the rounding of one process alone is 2e-6 of a gradient.
    """
    torch.manual_seed(0)
    if name == "led_model":
        model: nn.Module = LEDForConditionalGeneration(LEDConfig(**CONFIG))
    elif name == "drop-in":
        model = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**CONFIG))
    else:
        config = transformers.LongformerConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=64,
            max_position_embeddings=130,
            attention_window=[8, 16],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = getattr(transformers, name)(config)
    if dtype == torch.float64:
        randomize(model, 1)
    if name != "led_model":
        apply_led_kernels(model)
    return model.to(dtype).train()


def documents(rows: slice = slice(0, 4)) -> dict[str, Tensor]:
    """Returns documents with padding and global tokens anywhere; the third part of the first is padding alone."""
    inputs = random_inputs(5, batch=4, seqlen=SOURCE)
    del inputs["decoder_input_ids"]
    inputs["attention_mask"][0, 32:48] = 0
    labels = torch.randint(4, VOCAB_SIZE, (4, TARGET), generator=torch.Generator().manual_seed(1))
    labels[1, 6:] = -100
    return {name: x[rows] for name, x in inputs.items()} | {"labels": labels[rows]}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, inputs: dict[str, Tensor], wrapped: nn.Module | None = None) -> Tensor:
    loss = (model if wrapped is None else wrapped)(**inputs).loss
    loss.backward()
    return loss.detach()


@functools.cache
def expected(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Returns the loss and the gradients that one process has, the mean of two batches of two documents, in fp64.

    ``dtype`` is that of the weights under test.
    """
    model = build(name, dtype).double()
    loss = sum(step(model, documents(rows)) / 2 for rows in (slice(0, 2), slice(2, 4)))
    return {"loss": loss} | {name: grad / 2 for name, grad in gradients(model).items()}


def differences(model: nn.Module, loss: Tensor, reference: dict[str, Tensor]) -> dict[str, float]:
    return relative_differences({"loss": loss} | gradients(model), reference)


def meshes() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))


def all_ranks() -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))


def alone(name: str, dtype: torch.dtype, checkpointing: bool | None = None) -> dict[str, float]:
    """Compares two backwards of a model on all four ranks with those of one process."""
    model = context_parallel(build(name, dtype), all_ranks())
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return alone_of(model, name, dtype)


def alone_of(model: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    loss = sum(step(model, documents(rows)) / 2 for rows in (slice(0, 2), slice(2, 4)))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 2
    return differences(model, loss, expected(name, dtype))


def beside_data_parallelism(name: str, wrapper: str) -> dict[str, float]:
    mesh = meshes()
    rank = mesh["dp"].get_local_rank()
    own, other = (documents(slice(2 * r, 2 * r + 2)) for r in (rank, 1 - rank))
    averages = wrapper != "flattened"
    model = context_parallel(build(name), mesh["cp"], average_gradients=averages)
    wrapped: nn.Module = model
    if wrapper.startswith("ddp"):
        wrapped = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    else:
        shards = mesh["dp"] if averages else mesh["dp", "cp"]._flatten("all")
        if "layer" in wrapper:
            for layer in (*model.led.encoder.layers, *model.led.decoder.layers):
                fully_shard(layer, mesh=shards)
        fully_shard(model, mesh=shards)
    if wrapper == "ddp accumulated":
        with wrapped.no_sync():
            first = step(model, other, wrapped)
        loss = (first + step(model, own, wrapped)) / 2
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
    else:
        loss = step(model, own, wrapped)
        dist.all_reduce(loss, group=mesh["dp"].get_group())
        loss /= 2
    return differences(model, loss, expected(name))


def generated(name: str, sharded: bool, **settings: Any) -> tuple[Tensor, Tensor]:
    """Returns the tokens of one process and of this rank; with ``sharded`` each half of a mesh has other documents."""
    rows, model = slice(0, 4), build(name).eval()
    inputs = documents()
    if sharded:
        mesh = meshes()
        rank = mesh["dp"].get_local_rank()
        rows = slice(2 * rank, 2 * rank + 2)
        split = fully_shard(context_parallel(build(name).eval(), mesh["cp"]), mesh=mesh["dp"])
        settings["max_new_tokens"] += 3 * rank
    else:
        split = context_parallel(build(name).eval(), all_ranks())
    inputs = {key: x[rows] for key, x in inputs.items() if key != "labels"}
    return model.generate(**inputs, **settings), split.generate(**inputs, **settings)


def sampled(name: str) -> Tensor:
    """Returns tokens that are drawn on ranks with other seeds."""
    model = context_parallel(build(name).eval(), all_ranks())
    torch.manual_seed(dist.get_rank())
    inputs = {key: x for key, x in documents().items() if key != "labels"}
    return model.generate(**inputs, do_sample=True, max_new_tokens=8)


def after_a_failure(name: str) -> dict[str, float]:
    """Compares a backward that follows one that has raised."""
    model = context_parallel(build(name), all_ranks())

    def fails(*_: Any) -> None:
        raise RuntimeError("interrupted")

    handle = model.led.encoder.layers[0].register_full_backward_hook(fails)
    with pytest.raises(RuntimeError, match="interrupted"):
        step(model, documents())
    handle.remove()
    model.zero_grad()
    return alone_of(model, name)


def of_embeddings(name: str) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the embedded documents in one process and on this rank."""
    found = []
    for model in (build(name), context_parallel(copy.deepcopy(build(name)), all_ranks())):
        inputs = documents()
        embedded = model.led.encoder.embed_tokens(inputs.pop("input_ids")).detach().requires_grad_()
        step(model, inputs | {"inputs_embeds": embedded})
        found.append(embedded.grad)
    return found[0], found[1]


def frozen(name: str) -> dict[str, float]:
    """Compares a model of which little learns, and through whose graph two backwards go."""
    models = build(name), context_parallel(build(name), all_ranks())
    losses = []
    for model in models:
        for name_, parameter in model.named_parameters():
            parameter.requires_grad_("decoder.layers.0" in name_ or "encoder.layers.1" in name_)
        loss = model(**documents()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        losses.append(loss.detach())
    return differences(models[1], losses[1], {"loss": losses[0]} | gradients(models[0]))


def under_autocast(name: str) -> list[float]:
    """Returns the losses under autocast and in fp32, in one process and on this rank."""
    found = []
    for model in (build(name, torch.float32), context_parallel(build(name, torch.float32), all_ranks())):
        for is_enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                found.append(step(model, documents()).item())
    return found


def with_dropout(name: str) -> dict[str, Any]:
    """Returns the losses of all ranks, whose seeds differ, of two steps, and those of an evaluation after them."""
    model = build(name)
    for module in model.modules():
        for attribute in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.2)
    context_parallel(model, all_ranks())
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    losses = [step(model, documents()).item() for _ in range(2)]
    drawn = not torch.equal(before, torch.get_rng_state())
    return {
        "losses": losses,
        "sums": {name: grad.sum().item() for name, grad in gradients(model).items()},
        "evaluated": model.eval()(**documents()).loss.item(),
        "drawn": drawn,
    }


def head(name: str) -> dict[str, float]:
    """Compares a Longformer with a head, which looks at any row."""
    inputs = documents()
    del inputs["labels"]
    if name.endswith("Classification"):
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    elif name.endswith("LM"):
        inputs["labels"] = inputs["input_ids"]
    else:
        inputs |= {
            "start_positions": torch.tensor([1, 20, 40, 60]),
            "end_positions": torch.tensor([2, 30, 50, 60]),
        }
    model = build(name)
    split = context_parallel(copy.deepcopy(model), all_ranks())
    reference = {"loss": step(model, inputs)} | gradients(model)
    return differences(split, step(split, inputs), reference)


def rows_of_the_encoder(name: str) -> tuple[Tensor, Tensor]:
    """Returns this rank's rows of the encoder's output, and what it has."""
    model, split = build(name).eval(), context_parallel(build(name).eval(), all_ranks())
    inputs = documents()
    with torch.no_grad():
        states = [m(**inputs).encoder_last_hidden_state for m in (model, split)]
    rank = dist.get_rank()
    first = 16 * rank
    return states[0][:, first : first + 16], states[1]


def refused(change: Callable[[], Any]) -> str:
    try:
        change()
    except (ValueError, TypeError) as error:
        return f"refused: {error}"
    return "not refused"


def _refusals() -> dict[str, Callable[[], Any]]:
    def asked_for(name: str, **settings: Any) -> Any:
        model = context_parallel(build(name), all_ranks())
        return model(**documents(), **settings)

    def layerdrop(name: str) -> Any:
        model = context_parallel(build(name), all_ranks())
        model.led.encoder.layerdrop = 0.5
        return model(**documents())

    def too_short() -> Any:
        model = context_parallel(build("led_model"), all_ranks())
        return model(**{key: x[:, :10] for key, x in documents().items()})

    def packed() -> Any:
        model = context_parallel(build("led_model"), all_ranks())
        return model(
            input_ids=documents()["input_ids"].flatten(), cu_seqlens=torch.tensor([0, 61, 244]),
            labels=torch.ones(8, dtype=torch.int64), decoder_cu_seqlens=torch.tensor([0, 3, 8]),
        )  # fmt: skip

    def twice() -> Any:
        mesh = all_ranks()
        return context_parallel(context_parallel(build("led_model"), mesh), mesh)

    def stopped_by_a_clock(*args: Any, of_model: float | None = None, **settings: Any) -> None:
        model = context_parallel(build("drop-in").eval(), all_ranks())
        model.generation_config.max_time = of_model
        model.generate(documents()["input_ids"], *args, **settings)

    cases: dict[str, Callable[[], Any]] = {
        "two dimensions": lambda: context_parallel(build("led_model"), meshes()),
        "no mesh": lambda: context_parallel(build("led_model"), dist.group.WORLD),
        "no encoder": lambda: context_parallel(nn.Linear(2, 2), all_ranks()),
        "stock": lambda: context_parallel(
            transformers.LEDForConditionalGeneration(transformers.LEDConfig(**CONFIG)), all_ranks()
        ),
        "twice": twice,
        "too short": too_short,
        "packed": packed,
        "compiled": lambda: context_parallel(build("led_model").eval(), all_ranks()).generate(
            documents()["input_ids"], max_new_tokens=2, compiled=True
        ),
        "max_time": partial(stopped_by_a_clock, max_time=1.0),
        "max_time by position": partial(stopped_by_a_clock, transformers.GenerationConfig(max_time=1.0)),
        "max_time by name": partial(
            stopped_by_a_clock, generation_config=transformers.GenerationConfig(max_time=1.0)
        ),
        "max_time of the model": partial(stopped_by_a_clock, of_model=1.0),
    }
    for name in MODELS:
        cases[f"attentions {name}"] = partial(asked_for, name, output_attentions=True)
        cases[f"hidden states {name}"] = partial(asked_for, name, output_hidden_states=True)
        cases[f"layerdrop {name}"] = partial(layerdrop, name)
    return cases


def readme() -> tuple[Tensor, Tensor]:
    """Runs the README's lines on the CPU; returns the tokens of one process and those of this rank."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^<!-- several devices -->\n```py\n(.*?)```$", text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    model, batch = build("led_model"), documents()
    reference = build("led_model").eval()
    names: dict[str, Any] = {"model": model, "batch": batch}
    exec(compile(found.group(1).replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
    expected_ids = reference.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=20)
    assert any(parameter.grad is not None for parameter in model.parameters())
    return expected_ids, names["summary_ids"]


def main() -> dict[str, Any]:
    checks: dict[str, Callable[[], Any]] = {}
    for name in MODELS:
        for dtype in (torch.float64, torch.float32):
            checks[f"alone {name} {dtype}"] = partial(alone, name, dtype)
        for reentrant in (False, True):
            checks[f"checkpointing {name} {reentrant}"] = partial(alone, name, torch.float64, reentrant)
        for wrapper in WRAPPERS:
            checks[f"{wrapper} {name}"] = partial(beside_data_parallelism, name, wrapper)
        for beams in (1, 3):
            for sharded in (False, True):
                settings = {"max_new_tokens": 8, "num_beams": beams}
                checks[f"generate {name} {beams} {sharded}"] = partial(generated, name, sharded, **settings)
        checks[f"dropout {name}"] = partial(with_dropout, name)
        checks[f"sampled {name}"] = partial(sampled, name)
        checks[f"frozen {name}"] = partial(frozen, name)
        checks[f"autocast {name}"] = partial(under_autocast, name)
        checks[f"after a failure {name}"] = partial(after_a_failure, name)
        checks[f"embeddings {name}"] = partial(of_embeddings, name)
        checks[f"rows {name}"] = partial(rows_of_the_encoder, name)
    checks["readme"] = readme
    for name in HEADS:
        checks[name] = partial(head, name)
    for name, change in _refusals().items():
        checks[f"refused {name}"] = partial(refused, change)
    return run_checks(checks)
