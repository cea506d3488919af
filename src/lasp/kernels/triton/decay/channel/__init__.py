"""Kernels for a gate per key channel."""
