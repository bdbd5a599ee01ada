"""Checks that a call's tensors fit each other, before a kernel or a lookup would fail on them, or not fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from led_kernels.eager import is_eager
from led_model.precision import autocast_dtype

_ID_DTYPES = (torch.int64, torch.int32)  # the dtypes that an embedding takes


class TokenTables(Protocol):
    """Describes a stack of layers by the tables in which it looks its tokens and their positions up."""

    embed_tokens: nn.Embedding
    embed_positions: nn.Embedding


class LayerStack(TokenTables, Protocol):
    """Describes a stack of layers with its tables of tokens and positions."""

    @property
    def layers(self) -> nn.ModuleList:
        """Returns the layers, from the first to the last."""


def check_inputs(
    ids_name: str,
    ids: Tensor | None,
    embeds_name: str,
    embeds: Tensor | None,
    stack: TokenTables,
    one_position_each: bool = True,
) -> tuple[str, Tensor]:
    """Checks that ids or embeddings are given that fit the tables of ``stack``, and returns those with their name.

    The tables are ``embed_tokens`` and, where each token has a position of its own, ``embed_positions``.

    Raises:
        ValueError: for both or neither given, another shape, dtype or device, no tokens, ids outside the vocabulary,
            or more tokens than positions; with the argument's name.
    """
    if ids is not None and embeds is None:
        name, given = ids_name, ids
        check_ids(name, given, stack.embed_tokens)
    elif embeds is not None and ids is None:
        name, given = embeds_name, embeds
        check_hidden_states(name, given, stack.embed_positions)
    else:
        both = "missing" if ids is None else "given"
        raise ValueError(f"{ids_name} and {embeds_name} are both {both}; give one of them.")
    check_not_empty(name, given)
    positions = stack.embed_positions.weight.shape[0]  # the table may have been replaced
    if one_position_each and given.shape[1] > positions:
        raise ValueError(
            f"{name} has {given.shape[1]} tokens but the position table holds {positions}; cut or split the text."
        )
    return name, given


def check_hidden_states(name: str, states: Any, table: nn.Embedding) -> None:
    """Checks that ``states`` are ``[batch, length, d_model]`` for a model whose embeddings are ``table``.

    They must be floating point and on the table's device, and no wider than its dtype unless autocast is on.

    Raises:
        ValueError: naming the argument.
    """
    d_model, dtype = table.weight.shape[1], table.weight.dtype
    if not is_dense(states) or states.dim() != 3 or states.shape[2] != d_model:
        raise ValueError(f"{name} {describe(states)}; give [batch, length, d_model = {d_model}].")
    _check_device(name, states, table)
    fits = torch.promote_types(states.dtype, dtype) == dtype or autocast_dtype(states.device) is not None
    if not states.is_floating_point() or not fits:
        raise ValueError(f"{name} is {states.dtype} and the model {dtype}; convert one of them.")


def check_not_empty(name: str, given: Tensor) -> None:
    """Checks that ``given``, ``[batch, length]``, has tokens.

    Raises:
        ValueError: naming the argument.
    """
    if given.shape[1] == 0:
        raise ValueError(f"{name} has no tokens, its shape is {tuple(given.shape)}; give one at least.")


def check_ids(name: str, ids: Any, tokens: nn.Embedding) -> None:
    """Checks that ``ids`` are integers ``[batch, length]`` in the vocabulary of the table ``tokens`` and on its device.

    Raises:
        ValueError: naming the argument.
    """
    check_id_shape(name, ids)
    _check_device(name, ids, tokens)
    size = tokens.weight.shape[0]
    wrong = out_of_range(ids, 0, size - 1)
    if wrong is not None:
        raise ValueError(
            f"{name} holds id {wrong}, outside the vocabulary of {size}; "
            "use the tokenizer that belongs to the checkpoint."
        )


def check_id_shape(name: str, ids: Any) -> None:
    """Checks that ``ids`` are int64 or int32 ``[batch, length]``, whatever they are.

    Raises:
        ValueError: naming the argument.
    """
    if not is_dense(ids) or ids.dim() != 2 or ids.dtype not in _ID_DTYPES:
        raise ValueError(f"{name} {describe(ids)}; give int64 or int32 ids as a tensor [batch, length].")


def check_mask(name: str, mask: Any, given: Tensor, of: str) -> None:
    """Checks that ``mask`` is ``None``, or of the shape ``[batch, length]`` and the device of ``given``.

    ``of`` is what ``given`` is called.

    Raises:
        ValueError: naming both.
    """
    if mask is None:
        return
    shape = given.shape[:2]
    if not is_dense(mask) or mask.shape != shape or mask.is_complex():
        raise ValueError(f"{name} {describe(mask)}; give a tensor {tuple(shape)}, as {of} has.")
    if mask.device != given.device:
        raise ValueError(f"{name} is on {mask.device} and {of} on {given.device}; move both to one device.")


def check_traceable(name: str, given: Any, remedy: str) -> None:
    """Refuses to be traced without ``given``: the traced program would hold for these inputs alone.

    ``torch.compile`` is let pass, for it guards its programs.

    Raises:
        ValueError: with the ``name`` and the ``remedy``, when a tracer records operations and ``given`` is ``None``.
    """
    if given is not None or torch.compiler.is_compiling():
        return
    modes = torch._C._TorchDispatchModeKey
    if torch.jit.is_tracing() or any(map(torch._C._get_dispatch_mode, (modes.PROXY, modes.FAKE))):
        raise ValueError(f"{name}, and cannot be traced; {remedy}.")


def check_return_dict(return_dict: Any) -> None:
    """Refuses to return a tuple.

    Raises:
        ValueError: for a ``return_dict`` that is False.
    """
    if return_dict is not None and not return_dict:
        raise ValueError("return_dict is False; leave it out and call to_tuple() of the output.")


def check_binary(name: str, mask: Tensor | None) -> None:
    """Checks that ``mask`` holds nothing but 0 and 1, where looking costs no wait for a device.

    Raises:
        ValueError: naming the argument.
    """
    if mask is None or mask.dtype == torch.bool or not is_inspectable(mask):
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} holds other values than 0 for padding and 1 for tokens; use these only.")


def check_targets(
    name: str, targets: Any, shapes: Sequence[tuple[int, ...]], logits: Tensor, size: int | None = None
) -> None:
    """Checks that ``targets`` are integers of one of the ``shapes`` and on the device of ``logits``.

    With ``size`` each must be in ``[0, size)``, or -100 where no loss is wanted.

    Raises:
        ValueError: naming the argument.
    """
    check_target_shape(name, targets, shapes, logits)
    if targets.dtype not in _ID_DTYPES:
        raise ValueError(f"{name} {describe(targets)}; give int64 or int32 numbers.")
    if size is None or not is_inspectable(targets):
        return
    wrong = out_of_range(targets.masked_fill(targets == -100, 0), 0, size - 1)
    if wrong is not None:
        raise ValueError(f"{name} holds {wrong}; give 0 to {size - 1}, or -100 where no loss is wanted.")


def check_target_shape(name: str, targets: Any, shapes: Sequence[tuple[int, ...]], logits: Tensor) -> None:
    """Checks that ``targets`` have one of the ``shapes`` and are on the device of ``logits``.

    Raises:
        ValueError: naming the argument.
    """
    wanted = " or ".join(map(str, shapes))
    if not is_dense(targets) or tuple(targets.shape) not in shapes or targets.is_complex():
        raise ValueError(f"{name} {describe(targets)}; give a tensor {wanted}.")
    if targets.device != logits.device:
        raise ValueError(
            f"{name} is on {targets.device} and the logits on {logits.device}; move one of them."
        )


def check_encoder_hidden_states(states: Any, input_ids: Tensor, table: nn.Embedding) -> None:
    """Checks that ``states`` are the encoder's output for ``input_ids``, of a model whose embeddings are ``table``.

    Raises:
        ValueError: for another shape, dtype or device, or a document too many.
    """
    shape, name = (*input_ids.shape, table.weight.shape[1]), "encoder_hidden_states"
    if not is_dense(states) or states.shape != shape:
        raise ValueError(
            f"{name} {describe(states)}; give [batch, source, d_model] = {shape}, the encoder's output for input_ids."
        )
    _check_device(name, states, table)
    mixed = autocast_dtype(states.device) is not None
    if not states.is_floating_point() or (states.dtype != table.weight.dtype and not mixed):
        raise ValueError(f"{name} is {states.dtype} and the model {table.weight.dtype}; convert one of them.")


def _check_device(name: str, tensor: Tensor, table: nn.Embedding) -> None:
    """Checks that ``tensor`` is on the device of the table's weight, unless hooks move one of them there."""
    device = table.weight.device
    if tensor.device == device or "forward" in vars(table) or table._forward_pre_hooks:
        return
    raise ValueError(f"{name} is on {tensor.device} and the model on {device}; move one of them.")


def is_dense(value: Any) -> bool:
    """Returns whether ``value`` is a strided tensor."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def is_inspectable(values: Tensor) -> bool:
    """Returns whether looking at ``values`` waits for no device and ties no program to them."""
    return values.device.type == "cpu" and is_eager(values)


def out_of_range(values: Tensor, low: int, high: int) -> int | None:
    """Returns a value that is not from ``low`` to ``high``, or ``None``.

    It is ``None`` on a GPU too, where looking would cost a sync and lookups assert.
    """
    if not values.numel() or not is_inspectable(values):
        return None
    smallest, largest = (int(x) for x in values.aminmax())
    return smallest if smallest < low else largest if largest > high else None


def describe(value: Any) -> str:
    """Returns a clause on what an argument is: its dtype and shape, or the type of what is no tensor."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "is a nested tensor"
        kind = "" if value.layout == torch.strided else f"{value.layout} and "
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"is {kind}{value.dtype} of shape {tuple(value.shape)}{place}"
    return f"is a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
