"""Triton's interpreter without what it does over and over, more than half of these tests' time.

Every call of a device function patches the whole of `triton.language` anew. Every tensor's NumPy dtype is found in a
table made for the purpose; its shape is checked, wrapped and put in words, and compared item by item in its wrappings.
Every sum and product of integers is taken again in 64 bits, to see whether it overflows; at the shapes of these tests
none does (on a GPU one test has more than 2^31 elements). Here a kernel's launch patches for all it calls, and undoes
it as it did.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_find_dtype = interpreter._get_np_dtype
_dtypes: dict[str, Any] = {}
_broadcast_values = TritonSemantic.broadcast_impl_value
_make_block = core.block_type.__init__
# Shape in integers -> shape and number of elements as a type has them, and as a tensor has them.
_shapes: dict[tuple[int, ...], tuple[Any, int, Any, Any]] = {}


def _uses() -> tuple[Any, Any]:
    """Has in its globals the modules that are patched for a function: those that kernels and Triton's own use."""
    return tl, core


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _get_np_dtype(dtype: Any) -> Any:
    if isinstance(dtype, tl.block_type):
        dtype = dtype.element_ty
    if isinstance(dtype, tl.pointer_type):
        return np.dtype(np.uint64)
    if dtype.name not in _dtypes:
        _dtypes[dtype.name] = _find_dtype(dtype)
    return _dtypes[dtype.name]


def _init_block(self: Any, element_ty: Any, shape: Any) -> None:
    key = tuple(map(core._unwrap_if_constexpr, core._unwrap_if_constexpr(shape)))
    if key not in _shapes:
        _make_block(self, element_ty, shape)  # which checks it
        _shapes[key] = self.shape, self.numel, core.tuple(map(core.constexpr, key)), core.constexpr(self.numel)
    self.element_ty = element_ty
    self.shape, self.numel, _, _ = _shapes[key]


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[_integers(self)][2:]


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(value.type.shape.values) if value.type.is_block() else ()


def _broadcast(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
    one, other = _integers(left), _integers(right)
    if one == other:
        return left, right
    try:
        shape = np.broadcast_shapes(one, other)
    except ValueError:
        return _broadcast_values(self, left, right)  # which says why
    return _spread(left, one, shape), _spread(right, other, shape)


def _spread(value: Any, shape: tuple[int, ...], to: tuple[int, ...]) -> Any:
    if shape == to:
        return value
    dtype = value.type.scalar
    data = np.broadcast_to(value.handle.data.astype(_get_np_dtype(dtype), copy=False), to)
    return core.tensor(interpreter.TensorHandle(data, dtype), core.block_type(dtype, list(to)))


def install() -> None:
    _shapes[()] = (), 1, core.tuple(()), core.constexpr(1)
    core.block_type.__init__ = _init_block
    core.block_type.name = cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.block_type.name.__set_name__(core.block_type, "name")
    core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast
    interpreter._patch_lang = lambda function: _patch(_uses)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
