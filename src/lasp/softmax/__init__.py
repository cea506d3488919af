"""Softmax attention over sharded sequences, for the layers of hybrid models and as a baseline."""

from lasp.softmax.functions import softmax_attention

__all__ = ["softmax_attention"]
