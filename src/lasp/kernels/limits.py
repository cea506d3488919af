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
