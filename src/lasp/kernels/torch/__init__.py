"""Chunked PyTorch: runs on every device."""

from lasp.kernels.torch import decay, unmasked

__all__ = ["decay", "unmasked"]
