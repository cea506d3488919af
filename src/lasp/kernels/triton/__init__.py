"""Fused Triton kernels; nothing outside this package imports triton."""
