"""Triton's interpreter without what it does over and over, more than half of these tests' time.

Every call of a device function patches the whole of `triton.language` anew. Every tensor's NumPy dtype is found in a
table made for the purpose; its shape is checked, wrapped and put in words, and compared item by item in its wrappings.
Every operation finds out anew what type two types give, makes a tensor of a constant, and spreads over the whole shape
what NumPy spreads by itself. Every sum and product of integers is taken again in 64 bits, to see whether it overflows;
at the shapes of these tests none does (on a GPU one test has more than 2^31 elements). Here a kernel's launch patches
for all it calls, and undoes it as it did; what Triton decides about types and constants is asked once and remembered.
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
_check_operands = TritonSemantic.binary_op_type_checking_impl
_expand = TritonSemantic.expand_dims
_unwrap = core._unwrap_if_constexpr
_same_dtype = core.dtype.__eq__
_semantic = TritonSemantic(interpreter.interpreter_builder)
_plain = {int, float, bool, str, type(None), slice, core.tensor, core.dtype, core.block_type, core.pointer_type}
# Shape in integers -> shape and number of elements as a type has them, and as a tensor has them.
_shapes: dict[tuple[int, ...], tuple[Any, int, Any, Any]] = {}
_types: dict[tuple[str, tuple[int, ...]], Any] = {}
# Dtypes of two operands, and what the operation allows -> dtypes that they are cast to.
_operands: dict[Any, tuple[Any, Any]] = {}
# A tensor's dtype and shape, a number, what the operation allows -> dtype that it is cast to, the number as a tensor.
_numbers: dict[Any, tuple[Any, Any]] = {}


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
    data = value.handle.data.astype(_get_np_dtype(value.dtype), copy=False)
    return core.tensor(interpreter.TensorHandle(np.broadcast_to(data, to), value.dtype), _block_type(value.dtype, to))


def _block_type(dtype: Any, shape: tuple[int, ...]) -> Any:
    key = dtype.name, shape
    if key not in _types:
        _types[key] = core.block_type(dtype, list(shape))
    return _types[key]


def _check(self: Any, left: Any, right: Any, *allowed: Any, **named: Any) -> tuple[Any, Any]:
    """Both operands, of one shape and of the types that the operation takes."""
    if named or not isinstance(left, core.tensor):
        return _check_operands(self, left, right, *allowed, **named)
    if not isinstance(right, core.tensor):
        number = left.dtype.name, _integers(left), type(right), right, allowed
        if number not in _numbers:
            given, constant = _check_operands(self, left, right, *allowed)
            _numbers[number] = given.dtype, constant
            return given, constant
        dtype, constant = _numbers[number]
        return _cast(self, left, dtype), constant
    key = left.dtype.name, right.dtype.name, allowed
    if key not in _operands:
        left, right = _check_operands(self, left, right, *allowed)
        _operands[key] = left.dtype, right.dtype
        return left, right
    dtypes = _operands[key]
    return _align(_cast(self, left, dtypes[0]), _cast(self, right, dtypes[1]))


def _cast(self: Any, value: Any, dtype: Any) -> Any:
    return value if value.dtype.name == dtype.name else self.cast(value, dtype)


def _align(left: Any, right: Any) -> tuple[Any, Any]:
    """Gives operands one shape by their types alone: they are NumPy's next."""
    one, other = _integers(left), _integers(right)
    if one == other:
        return left, right
    try:
        shape = np.broadcast_shapes(one, other)
    except ValueError:
        return _broadcast_values(_semantic, left, right)  # which says why
    return tuple(  # type: ignore[return-value]
        value if own == shape else core.tensor(value.handle, _block_type(value.dtype, shape))
        for value, own in ((left, one), (right, other))
    )


def _expand_dims(self: Any, value: Any, axis: int) -> Any:
    shape = _integers(value)
    if not shape:
        return _expand(self, value, axis)
    to = (*shape[:axis], 1, *shape[axis:])
    return core.tensor(
        interpreter.TensorHandle(value.handle.data.reshape(to), value.dtype), _block_type(value.dtype, to)
    )


def _unwrap_if_constexpr(value: Any) -> Any:
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind in _plain else _unwrap(value)


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    function = getattr(member, "__wrapped__", member)

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = _semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, called)


def install() -> None:
    _shapes[()] = (), 1, core.tuple(()), core.constexpr(1)
    core.block_type.__init__ = _init_block
    core.block_type.name = cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.block_type.name.__set_name__(core.block_type, "name")
    core.tensor.__init__ = _init_tensor
    core.dtype.__eq__ = lambda self, other: self is other or _same_dtype(self, other)
    core._unwrap_if_constexpr = _unwrap_if_constexpr
    TritonSemantic.broadcast_impl_value = _broadcast
    TritonSemantic.binary_op_type_checking_impl = _check
    TritonSemantic.expand_dims = _expand_dims
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = lambda function: _patch(_uses)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
