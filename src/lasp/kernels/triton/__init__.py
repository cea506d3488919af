"""Fused Triton kernels; nothing outside this package imports triton."""

from lasp.kernels.torch import unmasked
from lasp.kernels.triton import decay

__all__ = ["decay", "unmasked"]
