"""Floating-point operations that a model needs for one token: the numerator of model FLOP utilisation.

Counted are matrix products and the recurrence in its own form, one token after another, whatever the kernels do: a
state of K x V numbers is added to and read, 2 K V operations each, and delta rules read it once more to correct it.
Chunked kernels spend more; that, recomputation, and everything elementwise (norms, maps, gates, decays, short
convolutions, the optimizer) does not count as work, so utilisation only rises by going faster. The backward pass
counts twice the forward pass: a gradient of each factor.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.model import layers
from lasp.models.config import ModelConfig


class Flops(NamedTuple):
    """Operations of one token's forward pass, a multiplication and an addition each counted.

    Attributes:
        matrices: products with the layers' weights.
        mixing: of the recurrence, or of softmax attention's scores and values.
        head: of the output projection.
    """

    matrices: float
    mixing: float
    head: float

    @property
    def step(self) -> float:
        """Forward and backward."""
        return 3 * sum(self)


def flops_per_token(config: ModelConfig, context: int) -> Flops:
    """The operations of one token in a sequence of `context` tokens, which matters to softmax layers alone.

    A token of causal softmax attention sees half of the context on average.
    """
    matrices = mixing = 0.0
    for each in layers(config):
        matrices += 2.0 * (each.mixer_matrices + each.ffn_matrices)
        mixing += each.operator.flops(context)
    return Flops(matrices, mixing, 2.0 * config.vocab_size * config.d_model)
