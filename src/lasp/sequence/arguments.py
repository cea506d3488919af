"""Checks arguments of public functions at their boundary, before any work: ValueError, which names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, form: str) -> None:
    """A dense tensor that holds numbers. form: what it must be, for the message."""
    if type(value) in _PLAIN and not value.is_meta and value.layout is torch.strided:  # type: ignore[attr-defined]
        return  # almost all are, and this is asked of every argument of every call
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor {form}, got {type(value).__name__}")
    if torch.compiler.is_compiling():  # where all tensors are fake
        return
    if value.is_meta or isinstance(value, FakeTensor):
        raise ValueError(
            f"{name} must hold numbers, and this one is fake or on the meta device, which is for building models: "
            "move the model with to_empty(device=..) and give it real tensors"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor {form}, got layout {value.layout}")


def check_floats(name: str, value: Tensor, form: str, dims: int) -> None:
    """A tensor with so many dims, of a dtype in FLOATS."""
    check_tensor(name, value, form)
    if value.dim() != dims:
        raise ValueError(f"{name} must be {form} ({dims} dims), got shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be one of {[str(d) for d in FLOATS]}, got {value.dtype}")


def check_ids(name: str, ids: Tensor, count: int, form: str, *, ignored: int | None = None) -> None:
    """Token ids, int64 of a form that the message names, from 0 to count - 1, or the ignored one.

    Values elsewhere than on a CPU are left to the kernels that use them, which assert the same: to look at them would
    wait for the device.
    """
    check_tensor(name, ids, f"int64 {form}")
    if ids.dtype != torch.int64 or ids.dim() != form.count(",") + 1:
        raise ValueError(f"{name} must be int64 {form}, got {ids.dtype} {list(ids.shape)}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    good = (ids >= 0) & (ids < count)
    if ignored is not None:
        good |= ids == ignored
    if not bool(good.all()):
        besides = "" if ignored is None else f" or {ignored}"
        raise ValueError(f"{name} must be from 0 to {count - 1}{besides}, got {int(ids[~good][0])}")


def check_flags(**flags: object) -> None:
    """Check that each is True or False. Raises ValueError."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def number(
    name: str, value: Any, must_be: str = "a finite number", good: Callable[[float], bool] = math.isfinite
) -> float:
    """`value` as a float: a constant, so that what would have a gradient is refused."""
    try:
        if isinstance(value, (bool, str, bytes)) or (isinstance(value, Tensor) and value.requires_grad):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be {must_be} without a gradient, got {value!r}") from error
    if not torch.compiler.is_compiling() and not good(result):
        raise ValueError(f"{name} must be {must_be}, got {value!r}")
    return result


def positive(name: str, value: Any) -> float:
    """`value` as a finite float above 0."""
    return number(name, value, "a number > 0", lambda value: 0 < value < math.inf)


def check_kind(name: str, value: object, *kinds: type) -> None:
    """An instance of one of these classes; None where NoneType is one of them."""
    if not isinstance(value, kinds):
        known = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be a {known}, got {type(value).__name__}")


def check_generator(generator: object) -> None:
    """A generator of PyTorch's, or None for the default one."""
    check_kind("generator", generator, torch.Generator, type(None))


def whole(name: str, value: Any, least: int) -> int:
    """`value` as a whole number >= least."""
    try:
        if isinstance(value, bool) or index(value) < least:
            raise TypeError
    except TypeError as error:
        raise ValueError(f"{name} must be >= {least} and a whole number, got {value!r}") from error
    return index(value)


def wholes(name: str, values: Any) -> tuple[int, ...]:
    """A one-dimensional tensor or a sequence of whole numbers as a tuple of ints."""
    if isinstance(values, Tensor):
        check_tensor(name, values, "of whole numbers")
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must be integers [N + 1], got {values.dtype} of shape {tuple(values.shape)}")
        return tuple(values.tolist())
    try:
        if isinstance(values, (str, bytes)) or any(isinstance(n, bool) for n in values):
            raise TypeError
        return tuple(index(n) for n in values)
    except TypeError as error:
        raise ValueError(f"{name} must be a tensor or a sequence of whole numbers, got {values!r}") from error


def as_operand(cu_seqlens: Tensor | Sequence[int] | None) -> Tensor | None:
    """Return packed documents as operators of compiled graphs take them, which read their numbers when they run."""
    if cu_seqlens is None or isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    return torch.tensor(wholes("cu_seqlens", cu_seqlens))
