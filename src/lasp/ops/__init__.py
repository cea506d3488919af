"""The public operators."""

from lasp.ops.functional import linear_attention, normalized_linear_attention

__all__ = ["linear_attention", "normalized_linear_attention"]
