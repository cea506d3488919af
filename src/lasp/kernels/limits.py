"""Limits of the fused kernels, and where they have been run (docs/design/kernels.md)."""

import torch

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the heads that they take as they are; wider ones are cut (triton/common/pieces.py).
FUSED_MAX_DIM = 256
# Of a delta rule's keys: a chunk of many more tokens than channels adds up writes that erase each other.
FUSED_MIN_KEYS = 4
FUSED_CAPABILITY = 8
# What a program must have for the delta rule's gates per channel of keys wider than 128, in 16 bits: their tiles.
# Chunks of half as many tokens, which fit less, were wrong on a GPU.
WIDE_CHANNELS_SHARED_BYTES = 220_000


def against_keys(keys: int, per_channel: bool, dtype: torch.dtype, shared_bytes: int) -> str:
    """The reason that the delta rule's kernels are not for heads of so many key channels; empty where they are.

    Args:
        per_channel: whether there is a gate for each.
        dtype: of the inputs.
        shared_bytes: shared memory that a program may have.
    """
    if keys < FUSED_MIN_KEYS:
        return f"of keys of fewer than {FUSED_MIN_KEYS} channels the delta rule's fused kernels lose digits"
    if keys > FUSED_MAX_DIM:
        return f"keys have {keys} channels, the delta rule's fused kernels take up to {FUSED_MAX_DIM}"
    if per_channel and keys > 128 and dtype == torch.bfloat16 and shared_bytes < WIDE_CHANNELS_SHARED_BYTES:
        return f"gates per channel of {keys} channels need {WIDE_CHANNELS_SHARED_BYTES} bytes of shared memory"
    return ""
