"""Bytes that one rank sends and receives for one layer, forward and backward, by method.

    W ranks share a sequence; B sequences, n tokens of each on every rank; D model width
    H query heads, G key-value heads, K and V channels of a head; a bytes of an activation

A byte counts once for every rank that gets it, so a gathered tensor of m bytes a rank is (W - 1) m sent and (W - 1) m
received. Counts depend on the method, not on the network's algorithm: all are what a rank must get at least, which
ring and direct algorithms reach for gather, reduce-scatter and all-to-all. benchmarks/volume.py and tests/analysis
compare every formula with bytes counted at torch.distributed. What tells which call a message belongs to, records
of 2 KiB between hosts or headers of 32 bytes on devices, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lasp.exchange.base import Exchange, Traffic
from lasp.exchange.payload import Payload


class Volume(NamedTuple):
    """Payload of one layer on one rank."""

    forward: Traffic
    backward: Traffic

    @property
    def step(self) -> Traffic:
        """Forward and backward together."""
        return self.forward + self.backward

    def __add__(self, other: object) -> Volume:
        assert isinstance(other, Volume)
        return Volume(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, kw_only=True)
class ShardShape:
    """One rank's part of an attention layer; all ranks hold equally many tokens.

    Attributes:
        batch, tokens: B and n.
        d_model: D.
        heads, key_heads: H and G.
        key_dim, value_dim: K and V.
        itemsize: a, bytes of an activation.
        sum_itemsize: bytes of a gradient that is summed over ranks on its way.
    """

    batch: int
    tokens: int
    d_model: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    itemsize: int = 2
    sum_itemsize: int = 4

    @property
    def key_value_numbers(self) -> int:
        return self.batch * self.tokens * self.key_heads * (self.key_dim + self.value_dim)

    @property
    def width_bytes(self) -> int:
        """Bytes of the layer's input on this rank, [B, n, D]."""
        return self.batch * self.tokens * self.d_model * self.itemsize


def state_exchange(exchange: Exchange, load: Payload, position: int, nodes: tuple[int, ...]) -> Volume:
    """A linear-attention layer whose state crosses ranks: what the exchange declares, in both directions.

    Source: `Exchange.traffic`. LASP is "ring", LASP-2 "all_gather", ZeCO's all-scan "pipelined". Neither n nor D
    occurs. `load` is of the layer's summary, with B * H heads.
    """
    size = sum(nodes)
    return Volume(
        exchange.traffic(load, position, nodes, want_total=False),
        exchange.traffic(load, size - 1 - position, nodes[::-1], want_total=False),
    )


def halo(channels: int, batch: int, width: int, itemsize: int, position: int, size: int) -> Volume:
    """A short convolution of `width`: B (width - 1) rows of `channels` to the next rank, their gradients back.

    Source: lasp.halo. Assumes shards of at least width - 1 tokens.
    """
    rows = batch * (width - 1) * channels * itemsize
    to_next, to_before = rows * (position < size - 1), rows * (position > 0)
    return Volume(Traffic(to_next, to_before), Traffic(to_before, to_next))


def gathered_softmax(shard: ShardShape, position: int, size: int) -> Volume:
    """LASP-2H's softmax layer, causal: keys and values are gathered, their gradients go to the ranks that own them.

    Forward (W - 1) B n G (K + V). Backward each rank sends the gradients of earlier ranks' keys and values only, as
    it has seen no others: `position` times as much, and gets those of the W - 1 - position later ones.
    Source: arXiv 2502.07563, section 3.5, as lasp.softmax does it.
    """
    part = shard.key_value_numbers * shard.itemsize
    gathered = part * (size - 1)
    return Volume(Traffic(gathered, gathered), Traffic(part * position, part * (size - 1 - position)))


def ulysses(shard: ShardShape, position: int, size: int) -> Volume:
    """DeepSpeed-Ulysses: all-to-all of q, k, v before attention and of o after it; the same back.

    B n (H K + G (K + V) + H V) (W - 1) / W each way where W divides G; where it does not, ranks share key heads and
    each gets those that its query heads use. Softmax or linear attention. Needs W to divide H.
    Source: arXiv 2309.14509, section 3.2.
    """
    share, group = shard.heads // size, shard.heads // shard.key_heads
    used = [(rank * share + share - 1) // group - rank * share // group + 1 for rank in range(size)]
    token = shard.batch * shard.tokens * shard.itemsize
    query, pair, value = share * shard.key_dim, shard.key_dim + shard.value_dim, share * shard.value_dim
    others = size - 1
    sent = token * (others * query + (sum(used) - used[position]) * pair)
    received = token * others * (query + used[position] * pair)
    out = token * others * value
    return Volume(Traffic(sent + out, received + out), Traffic(received + out, sent + out))


def ring_attention(shard: ShardShape, position: int, size: int) -> Volume:
    """Ring Attention: keys and values pass over all ranks; backward again, with the sums of their gradients.

    Forward (W - 1) B n G (K + V), backward that and (W - 1) B n G (K + V) sums. A block's owner adds its own share
    last, when the sum comes home, so that the sums take W - 1 hops too; released implementations take W.
    Blocks that a causal rank does not need pass through it all the same. Every rank sends what it receives.
    Source: arXiv 2310.01889, section 3.
    """
    keys = shard.key_value_numbers * shard.itemsize * (size - 1)
    sums = shard.key_value_numbers * shard.sum_itemsize * (size - 1)
    return Volume(Traffic(keys, keys), Traffic(keys + sums, keys + sums))


def megatron(shard: ShardShape, position: int, size: int, *, blocks: int = 2) -> Volume:
    """Megatron's sequence parallelism: tensor parallelism whose activations are cut along tokens between blocks.

    A block (attention, or feed-forward) gathers its input, (W - 1) B n D, and reduce-scatters its output, as much.
    Backward it gathers the output's gradient, gathers the input once more for the weights' gradients (only its part
    was kept) and reduce-scatters the input's gradient. Needs W to divide H (and G).
    Source: arXiv 2205.05198, section 4.2.2. With the weights cut over ranks, there is less data-parallel traffic.
    """
    moved = shard.width_bytes * (size - 1) * blocks
    return Volume(Traffic(2 * moved, 2 * moved), Traffic(3 * moved, 3 * moved))


def megatron_all_to_all(shard: ShardShape, position: int, size: int, *, gates: int) -> Volume:
    """Linear attention over context-parallel ranks as Megatron-Core does it for Mamba and Gated DeltaNet layers.

    All channels of the input projection (q, k, v and `gates` more: output gates, decays, betas) go from tokens to
    heads before convolution and recurrence, and o comes back after the gated norm:
    B n (H K + G (K + V) + gates + H V) (W - 1) / W each way. Ulysses, with more channels. Needs W to divide all heads.
    Source: Megatron-Core, megatron/core/ssm/mamba_context_parallel.py (z, x, B, C and dt go one way, y the other).
    """
    plain = ulysses(shard, position, size)
    more = shard.batch * shard.tokens * gates * shard.itemsize * (size - 1) // size
    return plain + Volume(Traffic(more, more), Traffic(more, more))


def all_reduce(nbytes: int, size: int) -> Traffic:
    """A sum that all ranks get, 2 m (N - 1) / N: a reduce-scatter and an all-gather, the least there is."""
    moved = 2 * nbytes * (size - 1) // size
    return Traffic(moved, moved)


def ddp(parameters: int, size: int, *, gradient_itemsize: int = 4) -> Traffic:
    """DistributedDataParallel, a step: gradients are all-reduced over all ranks, those of a sequence too.

    Sequence parallelism shards no weights, so its ranks count like data-parallel ones (LASP, section 3.3).
    """
    return all_reduce(parameters * gradient_itemsize, size)


def zero1(parameters: int, size: int, *, gradient_itemsize: int = 4, parameter_itemsize: int = 4) -> Traffic:
    """DDP with ZeroRedundancyOptimizer, a step: each rank also sends the weights that it updated to all others.

    The paper's stage 1 (arXiv 1910.02054, 7.2.1) reduce-scatters gradients and moves no more than DDP.
    """
    return ddp(parameters, size, gradient_itemsize=gradient_itemsize) + _shares(parameters * parameter_itemsize, size)


def zero2(parameters: int, size: int, *, gradient_itemsize: int = 4, parameter_itemsize: int = 4) -> Traffic:
    """FSDP2 that keeps gathered weights for the backward pass: a gather, and a reduce-scatter of gradients."""
    return _shares(parameters * (gradient_itemsize + parameter_itemsize), size)


def zero3(
    parameters: int, size: int, *, once: int = 0, gradient_itemsize: int = 4, parameter_itemsize: int = 4
) -> Traffic:
    """FSDP2 that gathers weights anew in the backward pass: two gathers, a reduce-scatter (arXiv 1910.02054, 7.2.2).

    once: of the parameters, those outside the blocks, which are gathered once, as they are needed last and first.
    """
    return _shares(parameters * (gradient_itemsize + 2 * parameter_itemsize) - once * parameter_itemsize, size)


def _shares(nbytes: int, size: int) -> Traffic:
    """Traffic of a rank that has a share of `nbytes` and gets the others', or sends each other rank its share."""
    moved = nbytes * (size - 1) // size
    return Traffic(moved, moved)
