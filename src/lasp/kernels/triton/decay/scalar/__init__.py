"""Kernels for decays that all channels of a head share: none, a constant per head, a gate per token."""
