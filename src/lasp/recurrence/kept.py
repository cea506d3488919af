"""Keeps what operators of compiled graphs save for their backward pass, of which they say what it is as they run.

How much there is follows from plans that are made for numbers of tokens, and from where documents lie. In a graph whose
sequences may have any length, or any documents, nobody knows it before. There a tensor stands for all of the memory in
which it lies, and has one byte itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)
_MAX_DIMS = 6
_NOTHING = [-1] * (2 + _MAX_DIMS)


def is_known(*sizes: int) -> bool:
    """True if sizes are numbers in the graph that is being made, which then is for these alone."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # not loaded but where there is a compiler

    return all(has_static_value(size) for size in sizes)


def kept(tensors: Sequence[Tensor], places: int, *, sized: bool) -> list[Tensor]:
    """The layout of `tensors`, int64 on the host, and then bytes in so many places; of all, or `sized` or not.

    The tensors must share no memory.
    """
    layout = [[_DTYPES.index(t.dtype), t.dim(), *t.shape, *[0] * (_MAX_DIMS - t.dim())] for t in tensors]
    missing = places - len(tensors)
    empty = (tensors[0].new_empty(0 if sized else 1, dtype=torch.uint8) for _ in range(missing))
    return [torch.tensor(layout + [_NOTHING] * missing), *(_bytes(t, sized) for t in tensors), *empty]


def _bytes(tensor: Tensor, sized: bool) -> Tensor:
    if not tensor.numel():
        return tensor.new_empty(0 if sized else 1, dtype=torch.uint8)
    whole = tensor.reshape(-1).view(torch.uint8)
    if sized:
        return whole
    return (whole if whole.untyped_storage().nbytes() == whole.numel() else whole.clone())[:1]


def restored(kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give back the tensors that `kept` was given.

    Raises:
        RuntimeError: something has copied what stands for more than itself.
    """
    layout, *parts = kept
    return tuple(
        _restored(part, _DTYPES[dtype], sizes[:dims])
        for part, (dtype, dims, *sizes) in zip(parts, layout.tolist(), strict=True)
        if dtype >= 0
    )


def _restored(part: Tensor, dtype: torch.dtype, sizes: list[int]) -> Tensor:
    memory, count = part.untyped_storage(), math.prod(sizes)
    if part.numel() == count * dtype.itemsize:
        return part.view(dtype).view(sizes)
    if memory.nbytes() < count * dtype.itemsize:
        raise RuntimeError(
            "a compiled graph for any number of tokens, or any packed documents, cannot have its saved tensors copied "
            "(torch.autograd.graph.save_on_cpu and other hooks do): run it without them, or uncompiled"
        )
    return part.new_empty(0, dtype=dtype).set_(memory)[:count].view(sizes)


def kept_like(tensors: Sequence[Tensor] | None, like: Tensor, places: int) -> list[Tensor]:
    """Give what `kept` does, for an operator's shape function: of `tensors`, or not `sized` if None."""
    sizes = [1] * places
    if tensors is not None:
        sizes = [t.numel() * t.element_size() for t in tensors] + [0] * (places - len(tensors))
    layout = like.new_empty(places, 2 + _MAX_DIMS, dtype=torch.int64, device="cpu")
    return [layout, *(like.new_empty(size, dtype=torch.uint8) for size in sizes)]
