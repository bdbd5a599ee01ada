"""Whether a call's tensors go with each other: told before a kernel or a lookup would fail on them, or not fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from led_kernels.eager import is_eager
from led_model.precision import autocast_dtype

_ID_DTYPES = (torch.int64, torch.int32)  # what a lookup takes


def embed(
    ids_name: str,
    ids: Tensor | None,
    embeds_name: str,
    embeds: Tensor | None,
    stack: nn.Module,
    one_position_each: bool = True,
) -> Tensor:
    """``[batch, length, d_model]``, from ids ``[batch, length]`` or as given, after :func:`check_inputs`."""
    check_inputs(ids_name, ids, embeds_name, embeds, stack, one_position_each)
    return embeds if ids is None else stack.embed_tokens(ids)


def check_inputs(
    ids_name: str,
    ids: Tensor | None,
    embeds_name: str,
    embeds: Tensor | None,
    stack: nn.Module,
    one_position_each: bool = True,
) -> None:
    """Holds ids or embeddings against the tables of ``stack``: ``embed_tokens`` and, where each token has a
    position of its own, ``embed_positions``.

    Raises:
        ValueError: for both or neither given, another shape, dtype or device, no tokens, ids outside the vocabulary,
            or more tokens than positions; with the argument's name.
    """
    if (ids is None) == (embeds is None):
        both = "missing" if ids is None else "given"
        raise ValueError(f"{ids_name} and {embeds_name} are both {both}; give one of them.")
    positions = stack.embed_positions.weight.shape[0]  # as it is now, not as it was built
    name, given = (embeds_name, embeds) if ids is None else (ids_name, ids)
    if ids is not None:
        check_ids(ids_name, ids, stack.embed_tokens)
    else:
        check_states(embeds_name, embeds, stack.embed_positions)
    check_some(name, given)
    if one_position_each and given.shape[1] > positions:
        raise ValueError(
            f"{name} has {given.shape[1]} tokens but the position table holds {positions}; cut or split the text."
        )


def check_states(name: str, states: Any, table: nn.Embedding) -> None:
    """``[batch, length, d_model]`` for a model whose embeddings are ``table``: floating point where the table is, no
    wider than it unless autocast makes it fit.

    Raises:
        ValueError: naming the argument.
    """
    d_model, dtype = table.weight.shape[1], table.weight.dtype
    if not is_dense(states) or states.dim() != 3 or states.shape[2] != d_model:
        raise ValueError(f"{name} {what(states)}; give [batch, length, d_model = {d_model}].")
    _check_place(name, states, table)
    fits = torch.promote_types(states.dtype, dtype) == dtype or autocast_dtype(states.device) is not None
    if not states.is_floating_point() or not fits:
        raise ValueError(f"{name} is {states.dtype} and the model {dtype}; convert one of them.")


def check_some(name: str, given: Tensor) -> None:
    """``[batch, length]`` is not of length 0.

    Raises:
        ValueError: naming the argument.
    """
    if given.shape[1] == 0:
        raise ValueError(f"{name} has no tokens, its shape is {tuple(given.shape)}; give one at least.")


def check_ids(name: str, ids: Any, tokens: nn.Embedding) -> None:
    """int64 or int32 ``[batch, length]`` inside the vocabulary of the table ``tokens``, and where that is.

    Raises:
        ValueError: naming the argument.
    """
    check_id_shape(name, ids)
    _check_place(name, ids, tokens)
    size = tokens.weight.shape[0]
    wrong = outside(ids, 0, size - 1)
    if wrong is not None:
        raise ValueError(
            f"{name} holds id {wrong}, outside the vocabulary of {size}; "
            "use the tokenizer that belongs to the checkpoint."
        )


def check_id_shape(name: str, ids: Any) -> None:
    """int64 or int32 ``[batch, length]``, whatever it holds.

    Raises:
        ValueError: naming the argument.
    """
    if not is_dense(ids) or ids.dim() != 2 or ids.dtype not in _ID_DTYPES:
        raise ValueError(f"{name} {what(ids)}; give int64 or int32 ids as a tensor [batch, length].")


def check_mask(name: str, mask: Any, given: Tensor, of: str) -> None:
    """``mask`` is ``None`` or numbers of the shape ``[batch, length]`` of ``given``, the argument ``of``, beside it.

    Raises:
        ValueError: naming both.
    """
    if mask is None:
        return
    shape = given.shape[:2]
    if not is_dense(mask) or mask.shape != shape or mask.is_complex():
        raise ValueError(f"{name} {what(mask)}; give a tensor {tuple(shape)}, as {of} has.")
    if mask.device != given.device:
        raise ValueError(f"{name} is on {mask.device} and {of} on {given.device}; move both to one device.")


def check_recordable(name: str, given: Any, remedy: str) -> None:
    """``given`` is there, or no tracer writes down what is computed, whose program would be of these inputs alone.

    ``torch.compile`` is not meant, which looks whether its program still holds.

    Raises:
        ValueError: with the ``remedy``.
    """
    if given is not None or torch.compiler.is_compiling():
        return
    modes = torch._C._TorchDispatchModeKey
    if torch.jit.is_tracing() or any(map(torch._C._get_dispatch_mode, (modes.PROXY, modes.FAKE))):
        raise ValueError(f"{name}, and cannot be traced; {remedy}.")


def check_flags(name: str, mask: Tensor | None) -> None:
    """Nothing but 0 and 1 is in ``mask``, where looking costs no wait for a device.

    Raises:
        ValueError: naming the argument.
    """
    if mask is None or mask.dtype == torch.bool or not may_look(mask):
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} holds other values than 0 for padding and 1 for tokens; use these only.")


def check_targets(
    name: str, targets: Any, shapes: Sequence[tuple[int, ...]], logits: Tensor, size: int | None = None
) -> None:
    """int64 or int32 of one of the ``shapes``, beside the ``logits`` of which they say the right one; with ``size``
    each in ``[0, size)``, or -100 where no loss is wanted.

    Raises:
        ValueError: naming the argument.
    """
    check_scores(name, targets, shapes, logits)
    if targets.dtype not in _ID_DTYPES:
        raise ValueError(f"{name} {what(targets)}; give int64 or int32 numbers.")
    if size is None or not may_look(targets):
        return
    wrong = outside(targets.masked_fill(targets == -100, 0), 0, size - 1)
    if wrong is not None:
        raise ValueError(f"{name} holds {wrong}; give 0 to {size - 1}, or -100 where no loss is wanted.")


def check_scores(name: str, targets: Any, shapes: Sequence[tuple[int, ...]], logits: Tensor) -> None:
    """Numbers of one of the ``shapes``, beside the ``logits`` that they are compared with.

    Raises:
        ValueError: naming the argument.
    """
    wanted = " or ".join(map(str, shapes))
    if not is_dense(targets) or tuple(targets.shape) not in shapes or targets.is_complex():
        raise ValueError(f"{name} {what(targets)}; give a tensor {wanted}.")
    if targets.device != logits.device:
        raise ValueError(
            f"{name} is on {targets.device} and the logits on {logits.device}; move one of them."
        )


def check_encoded(encoded: Any, input_ids: Tensor, table: nn.Embedding) -> None:
    """The encoder's output for ``input_ids``, for a model whose embeddings are ``table``.

    Raises:
        ValueError: for another shape, dtype or device, or a document too many.
    """
    shape = (*input_ids.shape, table.weight.shape[1])
    if not is_dense(encoded) or encoded.shape != shape:
        raise ValueError(
            f"encoded {what(encoded)}; give [batch, source, d_model] = {shape}, the encoder's output for input_ids."
        )
    _check_place("encoded", encoded, table)
    mixed = autocast_dtype(encoded.device) is not None
    if not encoded.is_floating_point() or (encoded.dtype != table.weight.dtype and not mixed):
        raise ValueError(
            f"encoded is {encoded.dtype} and the model {table.weight.dtype}; convert one of them."
        )


def _check_place(name: str, tensor: Tensor, module: nn.Module) -> None:
    """On the device of the module's weight, unless hooks move one of them there."""
    device = module.weight.device
    if tensor.device == device or "forward" in vars(module) or module._forward_pre_hooks:
        return
    raise ValueError(f"{name} is on {tensor.device} and the model on {device}; move one of them.")


def is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def may_look(values: Tensor) -> bool:
    """Whether looking at ``values`` waits for no device and ties no program to them."""
    return values.device.type == "cpu" and is_eager(values)


def outside(values: Tensor, low: int, high: int) -> int | None:
    """A value that is not from ``low`` to ``high``. On a GPU that would cost a sync, and there lookups assert."""
    if not values.numel() or not may_look(values):
        return None
    smallest, largest = (int(x) for x in values.aminmax())
    return smallest if smallest < low else largest if largest > high else None


def what(value: Any) -> str:
    """What an argument is, to be said of it: its dtype and shape, or the type of what is no tensor."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "is a nested tensor"
        kind = "" if value.layout == torch.strided else f"{value.layout} and "
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"is {kind}{value.dtype} of shape {tuple(value.shape)}{place}"
    return f"is a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
