"""Kernels for what mixers do beside their recurrence: short convolution, gated norm."""
