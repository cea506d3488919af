"""Adapters to flash-linear-attention's kernels (the extra `fla`). Nothing of it is imported before its first use."""

from lasp.kernels.fla import delta

__all__ = ["delta"]
