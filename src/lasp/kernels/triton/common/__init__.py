"""Shared by the kernels of every recurrence."""
