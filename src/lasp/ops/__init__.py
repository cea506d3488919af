"""The public operators."""

from lasp.ops.delta import delta_rule
from lasp.ops.functional import linear_attention, normalized_linear_attention

__all__ = ["delta_rule", "linear_attention", "normalized_linear_attention"]
