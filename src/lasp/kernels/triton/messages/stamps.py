"""`lasp.distributed.sealed.Stamps` in one launch each."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lasp.kernels.triton.common.launch import Launch, bind
from lasp.kernels.triton.messages.kernels import WORDS, begin_kernel, open_kernel, seal_kernel

BLOCK, WARPS = 4096, 4
_WORDS = int(WORDS.value)


class TritonStamps:
    """Stamps on tensors of a GPU; `found` is memory of the host that the GPU can write."""

    def begin(self, state: Tensor, forward: Tensor | None, plan: int) -> Tensor:
        header = state.new_empty(_WORDS)
        _begin(plan)(state_ptr=state, header_ptr=header, forward_ptr=forward)
        return header

    def seal(self, header: Tensor, payload: Tensor, length: int) -> Tensor:
        message = payload.new_empty(length)
        _seal(payload.dtype, payload.numel())(header_ptr=header, payload_ptr=payload, message_ptr=message)
        return message

    def open(self, header: Tensor, messages: Tensor, found: Tensor) -> None:
        _open(messages.dtype, *messages.shape)(header_ptr=header, messages_ptr=messages, found_ptr=found)


@lru_cache(maxsize=4096)
def _begin(plan: int) -> Launch:
    return bind(begin_kernel, (1, 1), {"plan": plan}, warps=1, stages=1)


@lru_cache(maxsize=256)
def _seal(dtype: torch.dtype, count: int) -> Launch:
    # One program at least, for the header.
    grid = (max(1, -(-count // BLOCK)), 1)
    fixed = {"count": count, "HEAD": _head(dtype), "BLOCK": BLOCK}
    return bind(seal_kernel, grid, fixed, warps=WARPS, stages=1)


@lru_cache(maxsize=256)
def _open(dtype: torch.dtype, messages: int, length: int) -> Launch:
    grid = (max(1, -(-(length - _head(dtype)) // BLOCK)), messages)
    fixed = {"length": length, "HEAD": _head(dtype), "FLOATING": dtype.is_floating_point, "BLOCK": BLOCK}
    return bind(open_kernel, grid, fixed, warps=WARPS, stages=1)


def _head(dtype: torch.dtype) -> int:
    return 8 * _WORDS // dtype.itemsize
