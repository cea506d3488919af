"""Chunked PyTorch: runs on every device."""

from lasp.kernels.torch import decay, delta, unmasked

__all__ = ["decay", "delta", "unmasked"]
