"""LASP: linear attention sequence parallelism for PyTorch."""

from lasp.distributed import ExchangeError
from lasp.halo import short_convolution, token_shift
from lasp.ops import delta_rule, linear_attention, normalized_linear_attention
from lasp.sequence import SequenceParallel
from lasp.softmax import softmax_attention

__version__ = "0.1.0"
__all__ = [
    "ExchangeError",
    "SequenceParallel",
    "delta_rule",
    "linear_attention",
    "normalized_linear_attention",
    "short_convolution",
    "softmax_attention",
    "token_shift",
]
