"""Memory of one rank in training, in bytes: parameters, gradients, optimizer, activations, states, buffers.

Activations are the tensors that autograd keeps between forward and backward, as each part of lasp.layers lists its
own; tests/analysis compares the lists with what PyTorch saves. Two widths occur: under autocast ("bf16") matrix
products and the recurrence keep 2 bytes a number, norms, decays and the residual stream 4; in fp32 all keep 4.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.analysis.model import Layer, embedding_parameters, layers, num_parameters, saved_by_norm
from lasp.kernels.torch import decay, delta
from lasp.models.config import ModelConfig
from lasp.models.loss import default_chunk_tokens

PRECISIONS = ("fp32", "bf16")


def chunks_of(each: Layer, tokens: int) -> int:
    """Number of chunks that a layer's PyTorch kernels cut `tokens` into; the backward pass keeps a state of each."""
    if each.operator.rule == "delta":
        chunk = delta.CHUNK
    else:
        chunk = decay.CHUNK_PER_CHANNEL if each.operator.decay == "channel" else decay.CHUNK
    return -(-tokens // chunk)


def state_cache_bytes(each: Layer, batch: int, tokens: int, processors: int | None) -> float:
    """fp32 states that the backward pass of a layer keeps (LASP's state cache, prefix of other ranks applied).

    PyTorch kernels keep one for every chunk. The GPU's (decays per head or channel) keep one for every segment, of
    which there are as many as fill `processors` about four times; `processors` None is a CPU.
    """
    operator = each.operator
    if operator.rule == "softmax":
        return 0.0
    count = chunks_of(each, tokens) * batch * operator.num_heads
    if processors is not None and operator.rule == "linear":
        count = min(count, max(batch * operator.num_heads, 4 * processors))
    return 4.0 * count * operator.key_dim * operator.value_dim


def entering_state_bytes(each: Layer, batch: int) -> float:
    """The fp32 states that enter this rank in a layer, one for each head, whatever the tokens."""
    return 4.0 * batch * each.operator.state_numbers


def loss_bytes(config: ModelConfig, positions: int, precision: str, *, on_gpu: bool) -> float:
    """Bytes that lasp.models.loss holds at once: a chunk of logits in the dtype of matrix products and, on a CPU, in
    fp32; under autocast a 16-bit copy of the head."""
    chunk = default_chunk_tokens(config.vocab_size, on_gpu=on_gpu, fused=on_gpu)
    logits, beside = min(positions, chunk) * config.vocab_size, 0.0 if on_gpu else 4.0
    return (
        logits * (4.0 + beside)
        if precision == "fp32"
        else (logits * (2.0 + beside) + 2.0 * config.vocab_size * config.d_model)
    )


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

    def scaled(self, kept: float, *, keeps: bool, alone: bool) -> Memory:
        """Memory where blocks keep so many times what is listed; unless `keeps`, of one block at a time.

        alone: one process trains. Its gradients are made as activations go, so that of them only those count that are
        more than these; buckets of several processes are there all the time.
        """
        activations, states = (kept * size if keeps else size for size in (self.activations, self.states))
        gradients = max(0.0, self.gradients - activations - states) if alone else self.gradients
        return self._replace(gradients=gradients, activations=activations, states=states, buffers=kept * self.buffers)


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
    compiled: bool = False,
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
        compiled: blocks are, and make 16-bit copies of weights again where they read them.
    """
    each = layers(config)
    inside = sum(one.parameters for one in each)
    count = num_parameters(config) - inside * (1 - weight_share)
    whole = {"ddp": (1, 1, 1), "zero1": (1, 1, 0), "zero2": (0, 0, 0), "zero3": (0, 0, 0)}[sharding]
    held = [4 * count * (1.0 if one else 1 / ranks) for one in whole]

    positions, d = batch * tokens, config.d_model
    activations = states = largest = 0.0
    for one in each:
        ffn = one.saved_by_ffn.nbytes(d, precision)
        mixer = one.saved_by_mixer.nbytes(d, precision) + extra_per_token
        cache = state_cache_bytes(one, batch, tokens, processors)
        largest = max(largest, positions * (mixer + ffn) + cache)
        if recomputation != "none":
            activations += positions * 4 * d
            states += entering_state_bytes(one, batch) if recomputation == "selective" else 0.0
            continue
        states += cache
        activations += positions * (mixer + ffn)
    # Final norm and the input of the loss; token ids and labels.
    activations += positions * (saved_by_norm(config) * 4 + d * (4 if precision == "fp32" else 2) + 16)
    narrow = 4 if precision == "fp32" else 2
    # While one layer's gradients are taken, those of its largest part are there, beside what was recomputed. The loss's
    # logits are gone by then.
    backward = positions * narrow * max(2 * config.ffn_dim, 4 * d) + (largest if recomputation != "none" else 0.0)
    buffers += max(backward, loss_bytes(config, positions, precision, on_gpu=processors is not None))
    largest_layer = max(embedding_parameters(config), max(one.parameters for one in each))
    if sharding in ("zero2", "zero3"):
        # Gathered weights, and the gradients of one layer before their sum, which is fp32.
        buffers += narrow * (count if sharding == "zero2" else 2 * largest_layer) + 4 * largest_layer
    elif precision == "bf16" and not compiled:
        matrices = sum(one.mixer_matrices + one.ffn_matrices for one in each) * weight_share
        # Autocast's 16-bit copies live as long as the layer's activations. Weights gathered in 16 bits need none.
        buffers += 2 * matrices / (1 if recomputation == "none" else config.num_layers)
    return Memory(held[0], held[1], 2 * held[2], activations, states, buffers)
