"""Memory of one rank in training, in bytes: parameters, gradients, optimizer, activations, states, buffers.

Activations are the tensors that autograd keeps between forward and backward, listed layer by layer from the code of
lasp.layers; tests/analysis compares the lists with what PyTorch saves. Two widths occur: under autocast ("bf16")
matrix products and the recurrence keep 2 bytes a number, norms, decays and the residual stream 4; in fp32 all keep 4.
D width, H heads, G key heads, K and V channels of a head, F feed-forward width.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.model import GLA_GATE_RANK, embedding_parameters, layer, layers, num_parameters
from lasp.models.config import ModelConfig
from lasp.models.loss import default_chunk_tokens

PRECISIONS = ("fp32", "bf16")
RECOMPUTATIONS = ("none", "selective", "full")
# As in lasp.parallelize.
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")
# Tokens between two states that the backward pass keeps, of the PyTorch kernels; per channel: shorter chunks.
CHUNK, CHUNK_PER_CHANNEL = 64, 16


class SavedTensor(NamedTuple):
    """What autograd keeps of a layer's part, for one token.

    Attributes:
        narrow: numbers in the dtype of matrix products.
        wide: numbers in fp32.
        inputs: projections that read one tensor of width D. In fp32 they keep it once, under autocast a 16-bit copy
            each.
    """

    narrow: float
    wide: float
    inputs: int

    def nbytes(self, width: int, precision: str) -> float:
        if precision == "fp32":
            return 4 * (self.narrow + self.wide + width * (self.inputs > 0))
        return 2 * (self.narrow + width * self.inputs) + 4 * self.wide


def saved_by_mixer(config: ModelConfig, index: int) -> SavedTensor:
    """Of the mixer of layer `index` (from 0) and the norm before it, without states.

    The short shards of gates and norm statistics count too; rows of padding do not.
    """
    each = layer(config, index)
    heads, keys, values = config.num_heads, config.num_heads * config.key_dim, config.num_heads * config.value_dim
    norm = _norm_wide(config)
    if config.is_softmax(index):
        pairs = each.key_heads * (config.key_dim + config.value_dim)
        rotation = config.key_dim if config.softmax_rotary else 0
        return SavedTensor(keys + pairs + 2 * values, norm + rotation + heads, each.inputs)
    if config.mixer == "linear-attention":
        return _linear(config, index, norm, each.inputs)
    if config.mixer == "gla":
        return SavedTensor(2 * keys + 5 * values + GLA_GATE_RANK, norm + 3 * keys + 2 * values + heads, each.inputs)
    if config.mixer == "mamba2":
        queries = 2 * heads * config.key_dim  # spread over the heads of their groups
        projected = values + each.convolved + heads
        narrow = 3 * each.convolved + queries + values + projected + 4 * values
        return SavedTensor(narrow, norm + 3 * heads + values + each.key_heads, each.inputs)
    # Delta rules: normalised queries and keys in fp32.
    qk = 2 * each.key_heads * config.key_dim
    narrow, wide = 3 * each.convolved + heads + values, norm + qk + 2 * each.key_heads + heads + 2 * values + heads
    if config.mixer == "gated-deltanet":
        narrow, wide = narrow + 3 * values, wide + 3 * heads
    elif config.mixer == "kda":
        narrow, wide = narrow + 2 * config.value_dim + 2 * values, wide + 3 * keys
    return SavedTensor(narrow, wide, each.inputs)


def _linear(config: ModelConfig, index: int, norm: float, inputs: int) -> SavedTensor:
    heads, keys, values = config.num_heads, config.num_heads * config.key_dim, config.num_heads * config.value_dim
    positions = config.layer_positions(index)
    mapped = {"identity": 2, "relu": 2, "silu": 4, "elu+1": 4, "hedgehog": 6}[config.feature_map]
    narrow, wide = float(mapped * keys + values), norm
    if positions == "lrpe":
        narrow += 4 * keys
    elif positions == "rotary":
        wide += config.key_dim
    if config.normalization == "denominator":
        return SavedTensor(narrow + heads + 2 * values + heads, wide + heads, inputs)
    wide += values + (heads if config.normalization == "head" else 1)
    gate = {"none": 1, "linear": 3}.get(config.gate, 4)
    return SavedTensor(narrow + gate * values, wide, inputs)


def _norm_wide(config: ModelConfig) -> float:
    """The residual stream that a norm reads, its statistics, and where it has a gain the normalised stream."""
    return {"simple_rmsnorm": config.d_model + 1, "rmsnorm": 2 * config.d_model + 1, "layernorm": config.d_model + 2}[
        config.norm
    ]


def saved_by_ffn(config: ModelConfig) -> SavedTensor:
    """Of the feed-forward layer and the norm before it."""
    kept = {"sglu": (3, 2), "swiglu": (4, 2), "gelu": (2, 1), "relu": (1, 1), "none": (0, 0)}[config.ffn]
    return SavedTensor(kept[0] * config.ffn_dim, _norm_wide(config) if kept[1] else 0.0, kept[1])


def chunks_of(config: ModelConfig, index: int, tokens: int) -> int:
    """How many chunks the PyTorch kernels of layer `index` cut `tokens` into."""
    each = layer(config, index)
    per_channel = each.transition == each.keys and config.mixer == "gla"
    return -(-tokens // (CHUNK_PER_CHANNEL if per_channel else CHUNK))


def state_cache_bytes(config: ModelConfig, index: int, batch: int, tokens: int, processors: int | None) -> float:
    """fp32 states that the backward pass of layer `index` keeps (LASP's state cache, prefix of other ranks applied).

    PyTorch kernels keep one for every chunk. The GPU's (decays per head or channel) keep one for every segment, of
    which there are as many as fill `processors` about four times; `processors` None is a CPU.
    """
    each = layer(config, index)
    if each.transition is None:
        return 0.0
    chunks = chunks_of(config, index, tokens) * batch * each.heads
    count = chunks
    if processors is not None and each.transition <= each.keys:
        count = min(chunks, max(batch * each.heads, 4 * processors))
    return 4.0 * count * each.keys * each.values


def entering_state_bytes(config: ModelConfig, index: int, batch: int) -> float:
    """The fp32 states that enter this rank in layer `index`, one for each head, whatever the tokens."""
    each = layer(config, index)
    return 0.0 if each.transition is None else 4.0 * batch * each.heads * each.keys * each.values


def loss_bytes(config: ModelConfig, positions: int, precision: str, *, on_gpu: bool) -> float:
    """What lasp.models.loss holds at once: a chunk of logits in fp32 and in the dtype of matrix products, and under
    autocast a 16-bit copy of the head."""
    logits = min(positions, default_chunk_tokens(config.vocab_size, on_gpu=on_gpu)) * config.vocab_size
    return logits * 8.0 if precision == "fp32" else logits * 6.0 + 2.0 * config.vocab_size * config.d_model


class Memory(NamedTuple):
    """Bytes of one rank, by what takes them."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    states: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


def training_memory(
    config: ModelConfig,
    *,
    batch: int,
    tokens: int,
    precision: str,
    recomputation: str,
    sharding: str,
    ranks: int,
    processors: int | None,
    extra_per_token: float = 0.0,
    weight_share: float = 1.0,
    buffers: float = 0.0,
) -> Memory:
    """Memory at the peak of a step, on one rank.

    Weights, gradients and AdamW's two moments are fp32, as `lasp train` holds them.

    Args:
        batch, tokens: sequences here, and tokens of each here.
        recomputation: "none"; "full": whole blocks run again in the backward pass, their exchange too, and of each only
            its input is kept; "selective": likewise, but the states that the exchange brought are kept.
        sharding: over all `ranks`, see lasp.parallelize: "ddp" nothing, "zero1" the optimizer, "zero2" and "zero3"
            weights and gradients too. For a step, zero2 gathers all weights, zero3 two layers' at a time, in the dtype
            of matrix products.
        processors: of the GPU; None for a CPU.
        extra_per_token: bytes that a method keeps beside (per token and layer).
        weight_share: of a layer's weights, where tensor parallelism divides them.
        buffers: bytes that a method needs at once beside.
    """
    each = layers(config)
    inside = sum(one.parameters for one in each)
    count = num_parameters(config) - inside * (1 - weight_share)
    whole = {"ddp": (1, 1, 1), "zero1": (1, 1, 0), "zero2": (0, 0, 0), "zero3": (0, 0, 0)}[sharding]
    held = [4 * count * (1.0 if one else 1 / ranks) for one in whole]

    positions, d = batch * tokens, config.d_model
    ffn = saved_by_ffn(config).nbytes(d, precision)
    activations = states = largest = 0.0
    for index in range(config.num_layers):
        mixer = saved_by_mixer(config, index).nbytes(d, precision) + extra_per_token
        cache = state_cache_bytes(config, index, batch, tokens, processors)
        largest = max(largest, positions * (mixer + ffn) + cache)
        if recomputation != "none":
            activations += positions * 4 * d
            states += entering_state_bytes(config, index, batch) if recomputation == "selective" else 0.0
            continue
        states += cache
        activations += positions * (mixer + ffn)
    # Final norm and the input of the loss; token ids and labels.
    activations += positions * (_norm_wide(config) * 4 + d * (4 if precision == "fp32" else 2) + 16)
    narrow = 4 if precision == "fp32" else 2
    # While one layer's gradients are taken, those of its largest part are there, beside what was recomputed. The loss's
    # logits are gone by then.
    backward = positions * narrow * max(2 * config.ffn_dim, 4 * d) + (largest if recomputation != "none" else 0.0)
    buffers += max(backward, loss_bytes(config, positions, precision, on_gpu=processors is not None))
    largest_layer = max(embedding_parameters(config), max(one.parameters for one in each))
    if sharding in ("zero2", "zero3"):
        # Gathered weights, and the gradients of one layer before their sum, which is fp32.
        buffers += narrow * (count if sharding == "zero2" else 2 * largest_layer) + 4 * largest_layer
    elif precision == "bf16":
        matrices = sum(one.mixer_matrices + one.ffn_matrices for one in each) * weight_share
        # Autocast's 16-bit copies live as long as the layer's activations. Weights gathered in 16 bits need none.
        buffers += 2 * matrices / (1 if recomputation == "none" else config.num_layers)
    return Memory(held[0], held[1], 2 * held[2], activations, states, buffers)
