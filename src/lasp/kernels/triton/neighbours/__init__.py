"""Kernels for what mixers do beside their recurrence: short convolution, steps of decays, gated norm."""
