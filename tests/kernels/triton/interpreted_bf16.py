"""bf16 in Triton's interpreter, which keeps it as integers, multiplies those, and rounds what it converts towards zero.

With this, products take bf16's values and add in fp32, and conversions round to the nearest, as GPUs do. Arithmetic in
bf16 itself stays wrong; the kernels do none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_cast = interpreter.InterpreterBuilder.cast_impl


def _to_bf16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        return _to_bf16(data)
    if source == tl.bfloat16 and target == tl.float32:
        return _from_bf16(data).view(np.uint32)
    return _convert(data, source, target, rounding)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar not in (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_to_bf16(source.data), tl.bfloat16)
    return _cast(self, source, target)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    left, right = (_from_bf16(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    with np.errstate(over="ignore", invalid="ignore"):  # kernels mask what overflows
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def install() -> None:
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
    interpreter.InterpreterBuilder.create_dot = _create_dot
