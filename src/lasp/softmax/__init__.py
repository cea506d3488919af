"""Softmax attention over sharded sequences, for the layers of hybrid models and as a baseline."""

from lasp.softmax.functions import METHODS, softmax_attention

__all__ = ["METHODS", "softmax_attention"]
