"""The public operators."""

from lasp.ops.delta import delta_rule, delta_rule_begin
from lasp.ops.functional import (
    linear_attention,
    linear_attention_begin,
    normalized_linear_attention,
    normalized_linear_attention_begin,
)

__all__ = [
    "delta_rule",
    "delta_rule_begin",
    "linear_attention",
    "linear_attention_begin",
    "normalized_linear_attention",
    "normalized_linear_attention_begin",
]
