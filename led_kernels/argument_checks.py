"""Arguments of public functions are checked here, before torch or Python refuses them in words of its own."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from led_kernels.eager import is_eager

_MAX_SIZE = 2**31 - 1  # Positions are int32.


def check_number(value: object, name: str) -> float:
    """Returns a real number, or a tensor of one that needs no gradient, as a float.

    Raises:
        TypeError: for anything else, also a tensor whose gradient would be lost.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(
                f"{name} is a tensor that requires grad, which it would not get; multiply q by it instead."
            )
        if value.numel() == 1 and not value.is_complex():
            return float(value)
        raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)} and {value.dtype}; give a number.")
    if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; give a number.")
    return float(value)


def check_size(value: object, name: str) -> None:
    """Checks that ``value`` is an int below 2^31, or one that a traced program will know.

    Raises:
        TypeError: for something else.
        ValueError: for a larger int.
    """
    if (type(value) is int and value <= _MAX_SIZE) or isinstance(value, torch.SymInt):
        return
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # Some releases make tensors of sizes then.
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; give an int.")
    if int(value) > _MAX_SIZE:
        raise ValueError(f"{name} is {value}; give at most {_MAX_SIZE}.")


def window_of(window_size: int | tuple[int, int], max_seqlen: int) -> tuple[int, int]:
    """Returns the window as ``(left, right)``: -1 (unlimited) and anything wider than a sequence become max_seqlen.

    Raises:
        TypeError, ValueError: for something else than an int or a pair of ints from -1 on.
    """
    sides = window_size if isinstance(window_size, (tuple, list)) else (window_size, window_size)
    if len(sides) != 2 or not all(
        isinstance(side, Integral) and not isinstance(side, bool) for side in sides
    ):
        raise TypeError(f"window_size is {window_size!r}; give an int or a pair (left, right) of ints.")
    sides = [int(side) for side in sides]
    if any(side < -1 for side in sides):
        raise ValueError(f"window_size is {window_size!r}; give 0 or more on each side, or -1 for unlimited.")
    left, right = (max_seqlen if side == -1 else min(side, max_seqlen) for side in sides)
    return left, right


def as_integers(values: object, name: str) -> Tensor:
    """Returns a tensor or a sequence of ints as an int64 tensor.

    Raises:
        TypeError: for something else; also for floats, which would be cut, and bools, which are no positions.
    """
    try:
        # torch.as_tensor would move a tensor to the default device.
        x = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is a {type(values).__name__} that no tensor can be made of; give ints."
        ) from error
    is_integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    if not is_integer and x.numel():
        raise TypeError(f"{name} has dtype {x.dtype}; give integers.")
    return x.to(torch.int64)


def check_marks(x: object, name: str) -> None:
    """Checks that ``x`` is a tensor whose values can be compared, and that its memory holds them.

    Raises:
        TypeError: otherwise.
        ValueError: when its storage was shrunk.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a torch.Tensor.")
    if x.is_complex():
        raise TypeError(f"{name} has dtype {x.dtype}; give bools, integers or floats.")
    if is_eager(x):
        check_storage(name, x)


def whole_numbers(x: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Returns ``x`` as int64, and whether all of it are whole numbers from ``lowest`` to ``highest``.

    The second is a bool tensor, and is computed before the conversion cuts anything.
    """
    numbers = x.to(torch.int64)
    given = x if x.is_floating_point() else numbers
    valid = ((given >= lowest) & (given <= highest)).all()
    return numbers, valid & (x == x.round()).all() if x.is_floating_point() else valid


def check_storage(name: str, x: Tensor) -> None:
    """Checks that the memory of ``x`` is as large as its shape and strides say; its storage may have been resized.

    Raises:
        ValueError: when it is smaller.
    """
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.itemsize if x.numel() else 0
    if (held := x.untyped_storage().nbytes()) < needed:
        raise ValueError(
            f"{name} needs {needed} bytes of its storage, which holds {held}: it was shrunk; resize it back, or give "
            "another tensor."
        )
