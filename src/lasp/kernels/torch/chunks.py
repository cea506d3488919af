"""Cutting a run into chunks, and joining them again."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def cut(tensor: Tensor, size: int) -> Tensor:
    """[B, T, H, D] -> [B, H, N, size, D], the last chunk padded with zeros."""
    tensor = pad(tensor, (0, 0, 0, 0, 0, -tensor.shape[1] % size))
    batch, tokens, heads, dim = tensor.shape
    return tensor.view(batch, tokens // size, size, heads, dim).permute(0, 3, 1, 2, 4).contiguous()


def join(tensor: Tensor, tokens: int) -> Tensor:
    """[B, H, N, C, D] -> [B, T, H, D]: the inverse of `cut`."""
    return tensor.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
