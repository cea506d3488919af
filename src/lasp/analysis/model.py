"""A model's numbers by layer, from its configuration: parameters, matrix products, states.

Parameters are counted in modules built on the meta device, which takes no memory; the rest is what the mixers'
configurations say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from lasp.exchange.payload import Payload
from lasp.layers import ShortConvolution
from lasp.layers.feedforward import FEEDFORWARDS
from lasp.layers.mixer import MixerConfig, MixerCost, Operator, SavedActivations
from lasp.layers.norms import NORMS, norm
from lasp.layers.parameters import decaying_parameters
from lasp.models.causal_lm import Block
from lasp.models.config import ModelConfig


class Layer(NamedTuple):
    """One layer.

    Attributes:
        mixer: its configuration, and `cost`: what that says of this layer.
        mixer_matrices, ffn_matrices: numbers in matrices that every token is multiplied with.
        parameters: those and others: norms, convolutions, decays, positions.
        saved_by_mixer, saved_by_ffn: activations kept for the backward pass, the norm's before it too; no states.
    """

    mixer: MixerConfig
    cost: MixerCost
    mixer_matrices: int
    ffn_matrices: int
    parameters: int
    saved_by_mixer: SavedActivations
    saved_by_ffn: SavedActivations

    @property
    def operator(self) -> Operator:
        return self.cost.operator

    @property
    def transition(self) -> int | None:
        """Numbers of a head's transition; None of softmax attention, which has no state to exchange."""
        return self.operator.transition

    def load(self, batch: int) -> Payload:
        """Payload of the exchange of the layer's state, for `batch` sequences."""
        operator = self.operator
        assert operator.transition is not None, "a softmax layer has no state to exchange"
        return Payload(batch * operator.num_heads, operator.key_dim, operator.value_dim, operator.transition)


@lru_cache(maxsize=4096)
def layer(config: ModelConfig, index: int) -> Layer:
    """Layer `index` (from 0)."""
    with torch.device("meta"):
        block = Block(config, index)
    mixer = config.mixer_of(index)
    cost, before = mixer.cost(config.context(index)), saved_by_norm(config)
    ffn = SavedActivations(0, 0, 0)
    if block.ffn is not None:
        kind = FEEDFORWARDS[config.ffn]
        ffn = SavedActivations(kind.saved * config.ffn_dim, before, kind.inputs)
    return Layer(
        mixer=mixer,
        cost=cost,
        mixer_matrices=matrix_numbers(block.attention),
        ffn_matrices=0 if block.ffn is None else matrix_numbers(block.ffn),
        parameters=_count(block),
        saved_by_mixer=cost.saved._replace(wide=before + cost.saved.wide),
        saved_by_ffn=ffn,
    )


def layers(config: ModelConfig) -> list[Layer]:
    return [layer(config, index) for index in range(config.num_layers)]


@lru_cache(maxsize=1024)
def embedding_parameters(config: ModelConfig) -> int:
    """Embedding, final norm, and the output projection where it is not tied."""
    tables = 1 if config.tied_embeddings else 2
    with torch.device("meta"):
        final_norm = norm(config.norm, config.d_model, config.norm_eps)
    return tables * config.vocab_size * config.d_model + _count(final_norm)


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers, as `lasp.models.num_parameters`, layer by layer."""
    return embedding_parameters(config) + sum(each.parameters for each in layers(config))


def matrix_numbers(module: nn.Module) -> int:
    """Numbers in weight matrices that every token is multiplied with: a convolution's work is elementwise."""
    convolutions = [each for each in module.modules() if isinstance(each, ShortConvolution)]
    elementwise = sum(each.weight.numel() for each in convolutions)
    return sum(each.numel() for _, each in decaying_parameters(module)) - elementwise


def saved_by_norm(config: ModelConfig) -> float:
    """fp32 numbers that a norm keeps for a token: the residual stream that it reads, its statistics, and where it has a
    gain the normalised stream."""
    kind = NORMS[config.norm]
    return kind.saved * config.d_model + kind.statistics


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
