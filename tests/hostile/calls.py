"""Hostile calls of public functions, operators and the extension: each returns or raises, none ends the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from led_kernels import (
    LongformerMask,
    absorbed_global_attention,
    banded_attention,
    global_attention,
    longformer_attention,
    ops,
)
from led_kernels.dispatch import backend_module
from led_kernels.gemv import decode_attention, few_rows_add_norm, few_rows_linear, write_rows
from tests.backends import backends_on
from tests.hostile.model_calls import model_call
from tests.hostile.processes import Trial, in_process

REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, OverflowError)
NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 8, 17, 100, 300, 2**24 + 1, 2**31 - 1, 2**40)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
BACKENDS = ["reference", *backends_on("cpu")]


def hostile(rng: random.Random, x: Tensor, shrinks: bool = False) -> Tensor:
    """Returns a tensor that is like ``x`` but for one thing.

    With ``shrinks``, for kernels, that may be its memory, at which torch's own operations do not look.
    """
    dim = rng.randrange(max(1, x.dim()))
    changes: list[Callable[[], Tensor]] = [
        lambda: x.to(rng.choice(DTYPES)),
        lambda: x.narrow(dim, 0, max(0, x.shape[dim] - 1)),
        lambda: x.narrow(dim, 0, 0),
        lambda: torch.cat([x, x], dim),
        lambda: x.transpose(0, -1),
        lambda: x.narrow(dim, 0, 1).expand_as(x),
        lambda: x.flip(dim),
        lambda: torch.cat([x, x], dim).narrow(dim, 1, x.shape[dim]),
        lambda: x.unsqueeze(dim),
        lambda: x.flatten(),
        lambda: x.to("meta"),
        lambda: torch.full_like(x, rng.choice(NUMBERS) if x.dtype.itemsize == 8 else rng.randrange(200)),
        lambda: torch.full_like(x, 2**30 if x.dtype in (torch.int32, torch.int64) else 0),
        lambda: -x,
        lambda: x[..., ::2],
        lambda: shrunken(rng, x) if shrinks else x,
        lambda: misaligned(x),
        lambda: torch._neg_view(x) if x.dtype != torch.bool else x,
        lambda: x.to_sparse() if rng.random() < 0.5 else x.flatten(0, -2).to_sparse_csr(),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    ]
    return rng.choice(changes)()


def shrunken(rng: random.Random, x: Tensor) -> Tensor:
    """Returns a copy of ``x`` most of whose memory was given back."""
    copy = x.clone()
    copy.untyped_storage().resize_(rng.choice([0, 1, max(0, copy.nbytes - 1)]))
    return copy


def misaligned(x: Tensor) -> Tensor:
    memory = bytearray(x.nbytes + 1)
    if not x.numel():
        return x
    memory[1:] = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


def edit_in_place(rng: random.Random, mask: LongformerMask, shrinks: bool) -> None:
    """Edits a mask in place, after it was checked."""
    x = rng.choice(mask.tensors())
    if shrinks and rng.random() < 0.3:
        x.untyped_storage().resize_(0)
    elif x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([0, 1, 2, 3, 5, 100])


def mask_of(rng: random.Random) -> LongformerMask:
    """Builds a mask by a constructor whose arguments are now and then out of bounds."""
    batch, seqlen = rng.randint(1, 3), rng.choice([1, 2, 9, 40])
    number = (lambda n: rng.choice(NUMBERS)) if rng.random() < 0.4 else (lambda n: n)
    most = rng.choice([None, None, 0, 1, 2, 5])
    index = [[rng.choice([0, seqlen - 1, -1, number(0)]) for _ in range(2)] for _ in range(batch)]
    kind = rng.randrange(3)
    if kind == 0:
        values = torch.tensor([[rng.choice([0, 1, 1, 2]) for _ in range(seqlen)] for _ in range(batch)])
        return LongformerMask.from_padding(
            hostile(rng, values) if rng.random() < 0.3 else values, max_globals=most
        )
    lengths = [number(rng.randint(0, seqlen)) for _ in range(batch)]
    if kind == 1:
        return LongformerMask.from_lengths(lengths, min(number(seqlen), 10**4), index, max_globals=most)
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    known = {"total_rows": min(number(total[-1]), 10**4)} if rng.random() < 0.5 and total[-1] < 10**4 else {}
    if total[-1] > 10**4 and known == {}:
        known = {"total_rows": 100}
    longest = {"max_seqlen": number(seqlen)} if rng.random() < 0.5 else {}
    return LongformerMask.packed(total, index if rng.random() < 0.7 else None, most, **known, **longest)


def rows_of(rng: random.Random, mask: LongformerMask) -> tuple[Tensor, ...]:
    heads, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 4, 7, 16])
    rows, padded = (
        mask.token_kind.numel(),
        mask.batch * mask.max_seqlen,
    )  # the oracle is quadratic in the latter
    if rows * heads * head_dim > 10**6 or rows > 20_000 or padded > 20_000:
        raise ValueError("too large a case")
    return torch.randn(6, *mask.token_kind.shape, heads, head_dim).unbind()


def public_call(rng: random.Random) -> None:
    mask = mask_of(rng)
    if rng.random() < 0.5:
        name = rng.choice(mask.tensors()._fields)
        change = hostile(rng, getattr(mask, name))
        mask = (
            replace(mask, **{name: change})
            if rng.random() < 0.8
            else replace(mask, max_seqlen=rng.choice(NUMBERS))
        )
    tensors, which = list(rows_of(rng, mask)), rng.randrange(4)
    shrinks = which < 2  # the others begin with operations of torch
    if rng.random() < 0.1:
        edit_in_place(rng, mask, shrinks)
    q_global = torch.randn(mask.batch, mask.max_globals, *tensors[0].shape[-2:])
    if rng.random() < 0.5:
        place = rng.randrange(6)
        tensors[place] = hostile(rng, tensors[place], shrinks)
    tensors = [x.requires_grad_() if x.is_floating_point() and rng.random() < 0.5 else x for x in tensors]
    settings = {"dropout_p": rng.choice([0.0, 0.0, 0.3, 1.0]), "backend": rng.choice(BACKENDS)}
    window = rng.choice([0, 2, -1, (1, 300), rng.choice(NUMBERS)])
    if which == 0:
        out = banded_attention(*tensors[:3], mask, window_size=window, **settings)
    elif which == 1:
        out = global_attention(q_global, *tensors[4:], mask, **settings)
    elif which == 2:
        out = longformer_attention(*tensors, mask, window_size=window, **settings)
    else:
        hidden = tensors[0].flatten(-2)
        weight = torch.randn(hidden.shape[-1], hidden.shape[-1])
        out = absorbed_global_attention(hidden, q_global, weight, hostile(rng, weight), None, mask)
    if out.requires_grad:
        out.sum().backward()


def operator_call(rng: random.Random) -> None:
    """Returns flat arguments, as a traced graph passes them, one or two of which are changed."""
    mask = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 0], [1, 2, 2, 1]]))
    banded, backward = rng.random() < 0.5, rng.random() < 0.5
    tokens = (2, 4, 2, 8)
    rows, lse = (tokens, (2, 2, 4)) if banded else ((2, 2, 2, 8), (2, 2, 2))
    q, k, v = torch.randn(rows), torch.randn(tokens), torch.randn(tokens)
    saved: list = [torch.randn(rows), torch.randn(lse)] if backward else []
    results: list = [torch.randn(rows), torch.randn(lse)] if backward else []
    window = [2, 2] if banded else []
    arguments = [*saved, q, k, v, *results, *mask.tensors(), None, 4, *window, 0.5, 0.0, rng.choice(BACKENDS)]
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(arguments) - 1)
        value = arguments[place]
        if isinstance(value, Tensor):
            arguments[place] = hostile(rng, value, shrinks=True)
        elif isinstance(value, int):
            arguments[place] = rng.choice(NUMBERS)
        elif isinstance(value, float):
            arguments[place] = rng.choice([0.0, -1.0, 0.5, float("nan"), float("inf")])
        else:
            arguments[place] = hostile(rng, torch.tensor([3]))
    name = f"{'banded' if banded else 'global'}_{'backward' if backward else 'forward'}"
    getattr(ops, name)(*arguments)


def decoding_call(rng: random.Random) -> None:
    batch, heads, keys, head_dim = rng.randint(1, 3), 2, rng.choice([1, 5, 40]), rng.choice([1, 8, 64])
    q, k, v = torch.randn(batch, heads, 1, head_dim), *torch.randn(2, batch, heads, keys, head_dim)
    visible = torch.ones(batch, 1, 1, keys).bool()
    position = torch.tensor([keys - 1])
    linear, norm, x = nn.Linear(head_dim, 5), nn.LayerNorm(head_dim), torch.randn(2, head_dim)
    calls = {
        decode_attention: [q, k, v, visible],
        write_rows: [k, position, q],
        few_rows_linear: [linear, x],
        few_rows_add_norm: [x, x.clone(), norm],
    }
    direct = {}
    if "cpu" in BACKENDS:
        cpu = backend_module("cpu")
        direct = {
            cpu.decode_attention: [q, k, v, visible],
            cpu.write_rows: [k, position, q],
            cpu.few_rows_linear: [x, linear.weight.detach(), linear.bias.detach(), True],
            cpu.few_rows_add_norm: [x, x.clone(), norm.weight.detach(), norm.bias.detach(), 1e-5],
        }
    function, arguments = rng.choice(list((calls | direct).items()))
    places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    changed = rng.sample(places, rng.randint(1, min(2, len(places))))
    for place in changed:  # of two changes one may lead to torch
        arguments[place] = hostile(rng, arguments[place], shrinks=len(changed) == 1)
    if rng.random() < 0.2 and len(changed) == 2 and function in (few_rows_linear, few_rows_add_norm):
        module = linear if function is few_rows_linear else norm
        module.weight = nn.Parameter(hostile(rng, module.weight.detach()).float())
    with torch.no_grad():
        function(*arguments)


def extension_call(rng: random.Random) -> None:
    """Parameters of the compiled functions, of which some are not those of the tensors that are given."""
    if "cpu" not in BACKENDS:
        return
    cpu, extension = backend_module("cpu"), backend_module("cpu")._C
    number = rng.choice(NUMBERS)
    if rng.random() < 0.3:
        x, y, weight, norm = torch.randn(2, 8), torch.empty(2, 5), torch.randn(5, 8), torch.randn(2, 8)
        position, cache = torch.tensor([1, 2]), torch.randn(1, 2, 4, 8)
        f32, isa = extension.DType.float32, cpu.instruction_set()
        at = memory
        rows = (*at(cache)[:1], 64, 8, 32, cache.nbytes)
        calls = {
            "cpu_few_rows_linear": [f32, (2, 8, 5), at(x), at(weight), 8, at(y[0]), at(y), True, 1, isa],
            "cpu_few_rows_add_norm": [f32, 2, 8, at(x), at(norm), at(x[0]), at(x[1]), at(norm), 1e-5, isa],
            "cpu_write_rows": [f32, (1, 2, 2, 8), 4, at(position), rows, rows, isa],
        }
        name = rng.choice(list(calls))
        for place in rng.sample(range(len(calls[name])), rng.choice([0, 1, 2])):
            calls[name][place] = spoilt(rng, calls[name][place])
        getattr(extension, name)(*calls[name])
        return
    n, is_global, dtype = 8, rng.random() < 0.5, rng.choice(["float32", "float64", "bfloat16"])
    mask = LongformerMask.from_padding(torch.tensor([[2, 1, 1, 1, 1, 1, 1, 0]] * 2))
    x = torch.randn(2, n, 2, 8).to(getattr(torch, dtype))
    results = x[:, : mask.max_globals].contiguous() if is_global else x
    lse = torch.zeros(2, 2, results.shape[1], dtype=torch.float64 if dtype == "float64" else torch.float32)
    params = extension.AttentionParams()
    sizes = {"batch": 2, "max_seqlen": n, "heads": 2, "head_dim": 8, "num_threads": 1, "window_left": 2}
    sizes |= {"window_right": 2, "dropout_p": 0.0, "dtype": getattr(extension.DType, dtype)}
    spoilt_sizes = rng.sample(list(sizes), rng.choice([0, 1, 1, 2]))
    for name, value in sizes.items():
        if name in spoilt_sizes:
            value = (
                rng.choice([extension.DType(number % 9), extension.DType.float64])
                if name == "dtype"
                else number
            )
        setattr(params, name, value)
    values = [hostile_values(rng, t) if rng.random() < 0.2 else t for t in mask.tensors()]
    layout = [n, mask.max_globals, False]
    if rng.random() < 0.3:
        layout[rng.randrange(3)] = rng.choice([number, True])
    params.set_mask([memory(x) for x in values], *layout)
    for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv"):
        if rng.random() < 0.98:
            given = results if name in ("q", "out", "d_out", "dq") else x
            place = (given.data_ptr(), given.stride(0), 16, 8, given.nbytes)
            getattr(params, f"set_{name}")(spoilt(rng, place) if rng.random() < 0.05 else place)
    place = (lse.data_ptr(), lse.stride(0), lse.stride(1), lse.nbytes)
    params.set_lse(spoilt(rng, place) if rng.random() < 0.05 else place)
    kernel = f"cpu_{'global' if is_global else 'banded'}_{rng.choice(['forward', 'backward'])}"
    getattr(extension, kernel)(params, rng.choice([cpu.instruction_set()] * 9 + ["no such set"]))


def memory(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.nbytes


def spoilt(rng: random.Random, value: object) -> object:
    """Returns another number, or a tuple with another: of an address only nothing or less memory than there is."""
    if not isinstance(value, tuple):
        return rng.choice(NUMBERS)
    parts, place = list(value), rng.randrange(len(value))
    if parts[0] > 2**32 and place == len(parts) - 1:
        parts[place] = rng.choice([-1, 0, 1, parts[place] - 1])
    elif parts[0] > 2**32 and place == 0:
        parts[place] = 0
    else:
        parts[place] = rng.choice(NUMBERS)
    return tuple(parts)


def hostile_values(rng: random.Random, x: Tensor) -> Tensor:
    return torch.full_like(
        x, rng.choice([0, 1, 100]) if x.dtype == torch.uint8 else rng.choice([-9, 0, 1, 9, 2**30])
    )


KINDS = {
    "public": public_call,
    "operator": operator_call,
    "decoding": decoding_call,
    "extension": extension_call,
    "model": lambda rng: model_call(rng, hostile),
}


def call(seed: str) -> int:
    """Makes the call of that seed, prints of which kind it is and how it ended, and returns an exit status."""
    rng = random.Random(seed)
    torch.manual_seed(rng.randrange(2**32))
    kind = rng.choices(list(KINDS), weights=[5, 4, 4, 4, 5])[0]
    end = "returned"
    try:
        KINDS[kind](rng)
    except REFUSALS as error:
        end = "refused" if str(error).strip() else "refused without a word"
    print(kind, end)
    return end == "refused without a word"


def run(seed: str) -> tuple[str, str | None]:
    """Tells how it ended, and what is wrong with that."""
    ended = in_process(lambda: call(seed))
    fault = ended.fault
    if fault is None and (ended.status or "Sanitizer" in ended.err or "runtime error:" in ended.err):
        fault = f"status {ended.status}: {ended.err[-3000:]}"
    return ended.out.strip(), fault


def trials(cases: int, seed: int) -> Iterator[Trial]:
    operator_call(
        random.Random(0)
    )  # torch imports much at the first call, which is not to happen in each process
    for index in range(cases):
        name = f"{seed} {index}"
        yield name, partial(run, name)
