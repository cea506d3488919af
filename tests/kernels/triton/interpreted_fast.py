"""Triton's interpreter without what it does over and over, more than half of these tests' time.

Every call of a device function patches the whole of `triton.language` anew. Every tensor's NumPy dtype is found in a
table made for the purpose. Every sum and product of integers is taken again in 64 bits, to see whether it overflows;
at the shapes of these tests none does (on a GPU one test has more than 2^31 elements). Here a kernel's launch patches
for all it calls, and undoes it as it did.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_find_dtype = interpreter._get_np_dtype
_dtypes: dict[str, Any] = {}


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


def install() -> None:
    interpreter._patch_lang = lambda function: _patch(_uses)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
