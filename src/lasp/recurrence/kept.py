"""Keeps what operators of compiled graphs save for their backward pass: bytes, of which they say what they are.

How many there are follows from plans that are made for numbers of tokens and from where documents lie. A graph whose
sequences may have any length, or any documents, knows neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)
_MAX_DIMS = 6


def as_bytes(tensors: Sequence[Tensor], places: int) -> list[Tensor]:
    """The layout, int64 on the host, then the bytes of `tensors`, which must share no memory; `places` of them."""
    layout = [[_DTYPES.index(t.dtype), t.dim(), *t.shape, *[0] * (_MAX_DIMS - t.dim())] for t in tensors]
    layout += [[-1] * (2 + _MAX_DIMS)] * (places - len(tensors))
    like = tensors[0]
    return [torch.tensor(layout), *(_flat(t) for t in tensors), *(_none(like) for _ in range(places - len(tensors)))]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else _none(tensor)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def from_bytes(kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that `as_bytes` was given."""
    layout, *parts = kept
    return tuple(
        part.view(_DTYPES[dtype]).view(sizes[:dims])
        for part, (dtype, dims, *sizes) in zip(parts, layout.tolist(), strict=True)
        if dtype >= 0
    )


def known_bytes(tensors: Sequence[Tensor], places: int) -> list[Tensor]:
    """Give what `as_bytes` does, for an operator's shape function that knows the tensors' shapes."""
    like = tensors[0]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors] + [0] * (places - len(tensors))
    return [_layout_like(like, places), *(like.new_empty(size, dtype=torch.uint8) for size in sizes)]


def any_bytes(like: Tensor, places: int) -> list[Tensor]:
    """Give what `as_bytes` does, for one that does not."""
    context = torch.library.get_ctx()
    sizes = [context.new_dynamic_size() for _ in range(places)]
    return [_layout_like(like, places), *(like.new_empty(size, dtype=torch.uint8) for size in sizes)]


def _layout_like(like: Tensor, places: int) -> Tensor:
    return like.new_empty(places, 2 + _MAX_DIMS, dtype=torch.int64, device="cpu")


def has_known_sizes(*tensors: Tensor | None) -> bool:
    """True if the sizes of tensors are numbers, in a graph that is made for these alone."""
    return not any(isinstance(size, torch.SymInt) for t in tensors if t is not None for size in t.shape)
