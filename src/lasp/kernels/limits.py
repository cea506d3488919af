"""Limits of the fused kernels, and where they have been run (docs/design/kernels.md)."""

import torch

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FUSED_MAX_DIM = 256
FUSED_CAPABILITY = 8
# Where value columns do not know of one another, wide values are cut into heads of at least so many columns.
MIN_PIECE = 64


def value_pieces(columns: int) -> int:
    """Number of equal parts, as few as possible, that values of the delta rule are cut into; one if there is no way."""
    counts = range(1, columns // MIN_PIECE + 1)
    return next((n for n in counts if columns % n == 0 and columns // n <= FUSED_MAX_DIM), 1)
