"""These checks run on every rank, which compares a parallelized model with the same one on one device."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from led_kernels import LongformerMask, banded_attention, global_attention, longformer_attention
from led_kernels.distributed import clip_grad_norm_, full_state_dict, parallelize
from led_kernels.hf import apply_led_kernels
from led_kernels.testing import assert_within_error_bound
from led_model import LEDConfig, LEDForConditionalGeneration
from led_model.checkpoint.tensor_names import to_hf_state_dict
from tests.distributed.compare import relative_differences
from tests.distributed.processes import run_checks
from tests.hf.hf_cases import VOCABULARY, HFCase, fused, led_model, longformer_model
from tests.model.small import randomize

CASE = HFCase()
BATCH, SOURCE, TARGET = 4, 19, 6
GLOBALS = {"none": 0, "some": 2, "many": 9}  # more than a head is wide, or not


def stock_model(untrained: bool = False, **overrides: Any) -> nn.Module:
    """Returns transformers' model, with weights of before training or such that attention is far from uniform."""
    overrides = {"decoder_layers": 2, "decoder_attention_heads": 4} | overrides
    if untrained:
        torch.manual_seed(0)
        config = CASE.led_config(init_std=transformers.LEDConfig().init_std, **overrides)
        return transformers.LEDForConditionalGeneration(config).eval().double()
    model = led_model(CASE, **overrides).double()
    randomize(model, 1)
    return model


def drop_in(**overrides: Any) -> nn.Module:
    return fused(stock_model(**overrides))


def own_model(**overrides: Any) -> nn.Module:
    stock = stock_model(**overrides)
    model = LEDForConditionalGeneration(LEDConfig.from_dict(stock.config.to_dict())).eval().double()
    with torch.no_grad():
        for name, tensor in to_hf_state_dict(model.state_dict()).items():
            tensor.copy_(stock.state_dict()[name])
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"drop-in": drop_in, "led_model": own_model}


def inputs(num_globals: int = 2, rows: slice = slice(BATCH)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, SOURCE), generator=generator)
    labels = torch.randint(3, VOCABULARY, (BATCH, TARGET), generator=generator)
    mask = torch.ones(BATCH, SOURCE, dtype=torch.int64)
    mask[1, 15:] = 0
    is_global = torch.zeros(BATCH, SOURCE, dtype=torch.int64)
    is_global[:, :num_globals] = 1
    found = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global, "labels": labels}
    return {name: x[rows] for name, x in found.items()}


@functools.cache
def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@functools.cache
def four() -> DeviceMesh:
    return init_device_mesh("cpu", (4,))


def two() -> DeviceMesh:
    """Returns the two ranks that share a model while the other two share another."""
    return two_by_two()["tp"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns whole gradients, by the names and in the shapes of an unsharded model."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}
    for name in [name for name in whole if ".qkv.0." in name]:
        parts = [whole.pop(name.replace(".qkv.0.", f".qkv.{part}.")) for part in range(3)]
        whole[name.replace(".qkv.0.", ".qkv.")] = torch.cat(parts)
    return whole


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest difference of two dicts of fp64 tensors, in units of the largest number of each tensor.

    Gradients that are 0 but for rounding, as those of a key's bias, are measured by the largest of all.
    """
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    largest = max(x.abs().max().item() for x in expected.values())

    def relative(name: str) -> float:
        size = expected[name].abs().max().item()
        return (actual[name] - expected[name]).abs().max().item() / (
            size if size > 1e-13 * largest else largest
        )

    return max(map(relative, expected))


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the loss and all gradients of one step."""
    model.train()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


def same_step(
    build: Callable[..., nn.Module], num_globals: int, again: bool = False, mesh: DeviceMesh | None = None
) -> float:
    plain = build()
    model = parallelize(copy.deepcopy(plain), mesh or two())
    if again:
        model.gradient_checkpointing_enable()
    batch = inputs(num_globals)
    return difference(step(model, batch), step(plain, batch))


def fp32_step(build: Callable[..., nn.Module]) -> bool:
    """Bounds the error of a step in fp32 by that of transformers' own model."""
    exact = build()
    model = parallelize(copy.deepcopy(exact).float(), two())
    oracle, found = (to_hf_state_dict(step(one, inputs())) for one in (exact, model))
    for name, plain in step(stock_model().float(), inputs()).items():
        assert_within_error_bound(found[name], oracle[name], plain, name)
    return True


def untrained_step_in_fp32(build: Callable[..., nn.Module], mesh: DeviceMesh) -> float:
    """Compares a step in fp32 of a model that nobody has trained with one in fp64 on one device."""
    exact = build(untrained=True)
    model = parallelize(copy.deepcopy(exact).float(), mesh)
    return max(relative_differences(step(model, inputs()), step(exact, inputs())).values())


def same_tokens(build: Callable[..., nn.Module], **settings: Any) -> bool:
    plain = build()
    model = parallelize(copy.deepcopy(plain), two())
    batch = inputs()
    del batch["labels"]
    settings |= {"max_new_tokens": 8, "no_repeat_ngram_size": 2}  # or they repeat one token
    expected, actual = (m.generate(**batch, **settings) for m in (plain, model))
    assert len(set(expected.flatten().tolist())) > 4, "the tokens say little"
    return torch.equal(actual, expected)


def state_dicts(build: Callable[..., nn.Module]) -> bool:
    """Writes the weights of a parallelized model into an unsharded one, and the other way."""
    plain, mesh = build(), two()
    model = parallelize(copy.deepcopy(plain), mesh)
    whole = full_state_dict(model)
    assert whole.keys() == plain.state_dict().keys(), whole.keys() ^ plain.state_dict().keys()
    assert all(torch.equal(whole[name], x) for name, x in plain.state_dict().items())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(full_state_dict(model)[name], x) for name, x in plain.state_dict().items())
    model.load_state_dict(model.state_dict())
    return difference(step(model, inputs()), step(plain, inputs())) <= 1e-10


def saved(build: Callable[..., nn.Module], shard: Callable[..., nn.Module]) -> bool:
    """Saves a sharded model on the first rank, and compares what is read from there with the weights before."""
    plain = build()
    model = shard(copy.deepcopy(plain), two())
    weights = full_state_dict(model)
    with tempfile.TemporaryDirectory() as own:
        directory = [own]
        dist.broadcast_object_list(directory)
        if dist.get_rank() == 0:
            model.save_pretrained(own, state_dict=weights)
        dist.barrier()
        loaded = type(plain).from_pretrained(directory[0]).state_dict()
        dist.barrier()
    return all(torch.equal(loaded[name], x) for name, x in plain.state_dict().items())


def saved_in_shards() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as directory:
        try:
            parallelize(own_model(), two()).save_pretrained(directory)
        except ValueError as error:
            assert not list(Path(directory).iterdir())
            return {"error": str(error)}
    return {"error": "none"}


def weights_of_the_first_rank(build: Callable[..., nn.Module]) -> bool:
    plain = build()
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + two().get_local_rank())
    whole = full_state_dict(parallelize(other, two()))
    return all(torch.equal(whole[name], x) for name, x in plain.state_dict().items())


def clipped(build: Callable[..., nn.Module]) -> float:
    plain = build()
    model = parallelize(copy.deepcopy(plain), two())
    for one in (plain, model):
        step(one, inputs())
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    actual = clip_grad_norm_(model.parameters(), 0.5)
    return difference({"norm": actual} | gradients(model), {"norm": expected} | gradients(plain))


def same_dropout(build: Callable[..., nn.Module]) -> bool:
    """Tells whether all ranks have the same results under dropout."""
    model = parallelize(build(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2), two())
    torch.manual_seed(3)
    found = step(model, inputs())
    others: list[Any] = [None] * 2
    dist.all_gather_object(others, found, group=two().get_group())
    return all(torch.equal(others[0][name], x) for name, x in found.items())


def attentions(build: Callable[..., nn.Module]) -> float:
    """Compares the probabilities of this rank's heads."""
    plain, mesh = build(), two()
    model = parallelize(copy.deepcopy(plain), mesh)
    expected, actual = (m(**inputs(), output_attentions=True) for m in (plain, model))
    share = CASE.heads // mesh.size()
    heads = slice(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)
    worst = 0.0
    for kind in ("encoder_attentions", "encoder_global_attentions", "decoder_attentions", "cross_attentions"):
        for mine, theirs in zip(actual[kind], expected[kind], strict=True):
            worst = max(worst, (mine - theirs[:, heads]).abs().max().item())
    return worst


def refusal(model: nn.Module, mesh: DeviceMesh | None = None) -> dict[str, str]:
    """Returns the error, and checks that nothing was changed."""
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        parallelize(model, mesh or two())
    except (TypeError, ValueError) as error:
        assert before == {name: type(module) for name, module in model.named_modules()}
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


class Adapter(nn.Linear):
    """Stands for a layer of another kind than ``nn.Linear``."""


def with_adapter() -> nn.Module:
    model = drop_in()
    model.led.decoder.layers[1].fc2.__class__ = Adapter
    return model


def longformer() -> float:
    plain = longformer_model(CASE).double().eval()
    apply_led_kernels(plain)
    model = parallelize(copy.deepcopy(plain), two())
    found = []
    batch = {name: x for name, x in inputs().items() if name != "labels"}
    for one in (model, plain):
        logits = one(**batch).logits
        logits[batch["attention_mask"].bool()].square().sum().backward()
        found.append({"logits": logits.detach()} | trained_gradients(one))
    return difference(*found)


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}


def trained_together(
    build: Callable[..., nn.Module], wrap: Callable[..., Any]
) -> tuple[nn.Module, nn.Module]:
    """Returns a model whose heads are sharded over one dimension and batches over the other, and one of one device.

    Both have taken two steps. ``wrap`` gets the first, and the other dimension of the mesh.
    """
    mesh = two_by_two()
    plain = build()
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    model = parallelize(copy.deepcopy(plain), mesh["tp"])
    wrapped, rank = wrap(model, mesh["dp"]), mesh["dp"].get_local_rank()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.3) for one in (model, plain)]
    for number in range(2):
        batch = inputs(2 + number)
        mine = {name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}
        for optimizer, one, given in zip(optimizers, (wrapped, plain), (mine, batch), strict=True):
            one.train()
            optimizer.zero_grad()
            one(**given).loss.backward()
            optimizer.step()
    assert difference(plain.state_dict(), before) > 0.01, "the weights stay what they were"
    return model, plain


def fully_sharded(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in (*model.led.encoder.layers, *model.led.decoder.layers):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_fsdp(build: Callable[..., nn.Module]) -> float:
    """Compares weights after training, and then again when they are loaded whole."""
    model, plain = trained_together(build, fully_sharded)
    worst = difference(full_state_dict(model), plain.state_dict())
    whole = build().state_dict()
    model.load_state_dict(whole)
    return max(worst, difference(full_state_dict(model), whole))


def with_ddp(build: Callable[..., nn.Module]) -> float:
    """Compares the weights that the optimizer has, of which the model keeps no name while DDP has it."""
    found: dict[str, Tensor] = {}
    mesh = two()

    def wrap(model: nn.Module, over: DeviceMesh) -> nn.Module:
        wrapped = DistributedDataParallel(model, device_mesh=over)
        found.update(model.named_parameters())
        return wrapped

    _, plain = trained_together(build, wrap)
    expected = {
        name: x.to_local() if isinstance(x, DTensor) else x
        for name, x in parallelize(plain, mesh).named_parameters()
    }
    return difference(found, expected)


def fsdp_generates(build: Callable[..., nn.Module]) -> bool:
    mesh = two_by_two()
    plain = build()
    model = fully_sharded(parallelize(copy.deepcopy(plain), mesh["tp"]), mesh["dp"])
    batch = inputs()
    del batch["labels"]
    limit = 5 + 3 * mesh["dp"].get_local_rank()
    return torch.equal(*(m.generate(**batch, max_new_tokens=limit) for m in (model, plain)))


def operator(name: str, where: str, is_packed: bool, backend: str | None = None) -> float:
    """Compares an operator of DTensors, forward and backward, with one of plain tensors."""
    mesh = two()
    torch.manual_seed(0)
    lengths, seqlen = torch.tensor([13, 21]), 21
    if is_packed:
        cu_seqlens = torch.tensor([0, 13, 34])
        mask = LongformerMask.packed(cu_seqlens, global_index=[[0, 5], [0, -1]])
        shape = (34, 4, 8)
    else:
        mask = LongformerMask.from_lengths(lengths, seqlen, global_index=[[0, 5], [0, -1]])
        shape = (2, 21, 4, 8)
    slots = (2, mask.max_globals, 4, 8)
    shapes = {"banded": [shape] * 3, "global": [slots, shape, shape], "longformer": [shape] * 6}[name]
    tensors = [torch.randn(one, dtype=torch.float64) for one in shapes]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        if name == "banded":
            return banded_attention(*given, mask, window_size=3, return_lse=True, backend=backend)
        if name == "global":
            return global_attention(*given, mask, return_lse=True, backend=backend)
        return (longformer_attention(*given, mask, window_size=3, backend=backend),)

    def both(given: list[Tensor]) -> dict[str, Tensor]:
        results = call(*given)
        grads = torch.autograd.grad(results[0].square().sum() + results[0].sum(), given)
        found = {f"result {i}": x.detach() for i, x in enumerate(results)}
        return found | {f"gradient {i}": x for i, x in enumerate(grads)}

    expected = both([x.clone().requires_grad_() for x in tensors])
    shard = {"heads": lambda x: Shard(-2), "batch": lambda x: Shard(0), "nothing": lambda x: Replicate()}[
        where
    ]
    found = both([distribute_tensor(x, mesh, [shard(x)]).requires_grad_() for x in tensors])
    if where == "heads":
        assert all(x.placements[0].is_shard() for x in found.values()), "it was gathered"
    return max(
        (found[key].full_tensor().nan_to_num(posinf=9) - x.nan_to_num(posinf=9)).abs().max().item()
        for key, x in expected.items()
    )


def dropout_of_sharded_heads() -> dict[str, str]:
    x = distribute_tensor(torch.randn(2, 21, 4, 8), two(), [Shard(2)])
    mask = LongformerMask.from_lengths(torch.tensor([13, 21]), 21)
    try:
        banded_attention(x, x, x, mask, window_size=3, dropout_p=0.5)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "none"}


OPERATORS = [
    (name, where, is_packed)
    for name in ("banded", "global", "longformer")
    for where in ("heads", "batch", "nothing")
    for is_packed in (False, True)
    if not (where == "batch" and is_packed)
]
BEAMS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}


def on_four_ranks() -> dict[str, Any]:
    checks: dict[str, Callable[[], Any]] = {}
    for name, build in MODELS.items():
        for kind, number in GLOBALS.items():
            checks[f"step {name} {kind}"] = partial(same_step, build, number)
        checks[f"step {name} fp32"] = partial(fp32_step, build)
        checks[f"step {name} checkpointing"] = partial(same_step, build, 2, again=True)
        for kind, settings in BEAMS.items():
            checks[f"tokens {name} {kind}"] = partial(same_tokens, build, **settings)
        checks[f"state dicts {name}"] = partial(state_dicts, build)
        for kind, shard in {"parallelize": parallelize, "fully_shard": fully_sharded}.items():
            checks[f"saved {name} {kind}"] = partial(saved, build, shard)
        checks[f"first rank {name}"] = partial(weights_of_the_first_rank, build)
        checks[f"clipped {name}"] = partial(clipped, build)
        checks[f"dropout {name}"] = partial(same_dropout, build)
        checks[f"attentions {name}"] = partial(attentions, build)
    checks["tokens drop-in static"] = partial(same_tokens, drop_in, cache_implementation="static")
    checks["longformer"] = longformer
    for name, where, is_packed in OPERATORS:
        checks[f"operator {name} {where} {is_packed}"] = partial(operator, name, where, is_packed)
    checks["operator dropout"] = dropout_of_sharded_heads
    checks["saved in shards"] = saved_in_shards
    checks["refuses stock"] = lambda: refusal(stock_model())
    checks["refuses twice"] = lambda: refusal(parallelize(drop_in(), two()))
    checks["refuses adapter"] = lambda: refusal(with_adapter())
    checks["refuses sharded"] = lambda: refusal(fully_shard(drop_in()))
    checks["refuses feed-forward"] = lambda: refusal(drop_in(decoder_ffn_dim=25))
    for name, build in MODELS.items():
        checks[f"step {name} four"] = partial(same_step, build, 2, mesh=four())
        for ranks, mesh in {2: two(), 4: four()}.items():
            checks[f"step {name} fp32 {ranks}"] = partial(untrained_step_in_fp32, build, mesh)
        checks[f"fsdp {name}"] = partial(with_fsdp, build)
        checks[f"ddp {name}"] = partial(with_ddp, build)
        checks[f"tokens {name} fsdp"] = partial(fsdp_generates, build)
    of_two_heads = led_model(CASE, decoder_attention_heads=2)
    checks["refuses heads"] = lambda: refusal(fused(of_two_heads), four())
    checks["refuses mesh"] = lambda: refusal(drop_in(), two_by_two())
    return run_checks(checks)
