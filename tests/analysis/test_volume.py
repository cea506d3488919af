"""Formulas against bytes counted at torch.distributed, and the baselines they describe against one device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from world import run

import lasp
from benchmarks.baselines.counter import counting
from benchmarks.baselines.megatron import attention_block, feedforward_block
from benchmarks.baselines.ring import ring_attention
from benchmarks.baselines.ulysses import ulysses
from lasp.analysis import volume
from lasp.analysis.volume import ShardShape
from lasp.exchange import EXCHANGES, Payload

SIZES = [2, 3, 4]
HEADS, KEY_HEADS = 48, 24  # multiples of all sizes
B, K, V = 2, 3, 2
ERROR = 1e-12
SHORT, LONG = 2, 128  # tokens a rank


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lasp.linear_attention(q, k, v)[0]


def shard(tensor: Tensor, dim: int = 1) -> Tensor:
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone().requires_grad_()


def inputs(tokens: int, key_heads: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v of the whole sequence, the same on every rank, and the gradient of o."""
    random = torch.Generator().manual_seed(0)
    shapes = [(HEADS, K), (key_heads, K), (key_heads, V), (HEADS, V)]
    *qkv, d_o = (torch.randn(B, tokens, *shape, generator=random, dtype=torch.float64) for shape in shapes)
    return qkv, d_o


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def describe(tokens: int, key_heads: int) -> ShardShape:
    return ShardShape(
        batch=B, tokens=tokens, d_model=1, heads=HEADS, key_heads=key_heads, key_dim=K, value_dim=V, itemsize=8,
        sum_itemsize=8,
    )  # fmt: skip


BASELINES = {
    "ring softmax": (lambda q, k, v: ring_attention(q, k, v, dist.group.WORLD), softmax, KEY_HEADS),
    "ulysses softmax": (lambda q, k, v: ulysses(softmax, q, k, v, dist.group.WORLD), softmax, KEY_HEADS),
    "ulysses linear": (lambda q, k, v: ulysses(linear, q, k, v, dist.group.WORLD), linear, HEADS),
}
FORMULAS = {"ring softmax": volume.ring_attention, "ulysses softmax": volume.ulysses, "ulysses linear": volume.ulysses}


def check_baseline(name: str, rank: int, size: int) -> list[tuple[int, int]]:
    """Short: outputs and gradients against one device. Bytes against the formula; what was counted per length."""
    method, single, key_heads = BASELINES[name]
    found = []
    for tokens in (SHORT, LONG):
        qkv, d_o = inputs(tokens * size, key_heads)
        parts = [shard(t) for t in qkv]
        with counting() as count:
            o = method(*parts)
            forward = count.take()
            o.backward(shard(d_o))
            backward = count.take()
        if tokens == SHORT:
            whole = [t.clone().requires_grad_() for t in qkv]
            expected = single(*whole)
            expected.backward(d_o)
            assert error(o, shard(expected)) < ERROR
            for part, leaf in zip(parts, whole, strict=True):
                assert error(part.grad, shard(leaf.grad)) < ERROR, name
        derived = FORMULAS[name](describe(tokens, key_heads), rank, size)
        assert (forward, backward) == tuple(map(tuple, derived)), (name, tokens)
        found.append((forward[0] + backward[0], forward[1] + backward[1]))
    return found


def check_megatron(rank: int, size: int, tokens: int) -> tuple[int, int]:
    """Attention and feed-forward blocks, weights' gradients included; the bytes they take."""
    width, hidden = 5, 2 * size
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, d_y = normal(B, tokens * size, width), normal(B, tokens * size, width)
    qkv, out = normal(3, HEADS, K, width), normal(width, HEADS * K)
    up, down = normal(hidden, width), normal(width, hidden)

    leaves = [t.clone().requires_grad_() for t in (x, qkv, out, up, down)]
    q, k, v = torch.einsum("btd,shkd->sbthk", leaves[0], leaves[1])
    y = F.linear(linear(q, k, v).flatten(-2), leaves[2])
    expected = F.linear(F.relu(F.linear(y, leaves[3])), leaves[4])
    expected.backward(d_y)

    parts = [shard(x), shard(qkv, 1), shard(out, 1), shard(up, 0), shard(down, 1)]
    group = dist.group.WORLD
    with counting() as count:
        y = attention_block(linear, parts[0], parts[1].flatten(0, 2), parts[2], HEADS // size, group)
        y = feedforward_block(F.relu, y, parts[3], parts[4], group)
        forward = count.take()
        y.backward(shard(d_y))
        backward = count.take()
    assert error(y, shard(expected)) < ERROR
    for part, leaf, dim in zip(parts, leaves, (1, 1, 1, 0, 1), strict=True):
        assert error(part.grad, shard(leaf.grad, dim)) < ERROR
    description = ShardShape(
        batch=B, tokens=tokens, d_model=width, heads=HEADS, key_heads=HEADS, key_dim=K, value_dim=K, itemsize=8
    )
    assert (forward, backward) == tuple(map(tuple, volume.megatron(description, rank, size)))
    return forward[0] + backward[0], forward[1] + backward[1]


def check_state_exchanges(rank: int, size: int) -> None:
    """Every schedule, with transitions of 0, 1 and K numbers a head: the formula, whatever the length."""
    heads, keys, values = 5, 3, 4
    sp = lasp.SequenceParallel(dist.group.WORLD)
    for name in EXCHANGES:
        sp.exchange = EXCHANGES[name]()  # new process groups for each would take most of the test's time
        for transition, lengths in ((0, [SHORT]), (1, [SHORT, LONG]), (keys, [SHORT])):
            load = Payload(B * heads, keys, values, transition)
            derived = volume.state_exchange(EXCHANGES[name](), load, rank, (size,))
            for tokens in lengths:
                q, k, v = (torch.randn(B, tokens, heads, d).requires_grad_() for d in (keys, keys, values))
                gate = (B, tokens, heads) if transition == 1 else (B, tokens, heads, keys)
                g = None if transition == 0 else torch.full(gate, -0.1, requires_grad=True)
                with counting() as count:
                    o, _ = lasp.linear_attention(q, k, v, g, sp=sp)
                    forward = count.take()
                    o.sum().backward()
                    backward = count.take()
                assert (forward, backward) == tuple(map(tuple, derived)), (name, transition, tokens)


def check_softmax_layers(rank: int, size: int) -> None:
    """Softmax layers of hybrid models, by both methods, and the rows of a short convolution."""
    sp = lasp.SequenceParallel(dist.group.WORLD)
    for method, formula, key_heads in (
        ("all_gather", volume.gathered_softmax, KEY_HEADS),
        ("ulysses", volume.ulysses, KEY_HEADS),
        ("ulysses", volume.ulysses, 2),
    ):
        qkv, d_o = inputs(4 * size, key_heads)
        parts = [shard(t) for t in qkv]
        with counting() as count:
            o, _ = lasp.softmax_attention(*parts, sp=sp, method=method)
            forward = count.take()
            o.backward(shard(d_o))
            backward = count.take()
        assert (forward, backward) == tuple(map(tuple, formula(describe(4, key_heads), rank, size))), method
    x, weight = torch.randn(B, 8, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with counting() as count:
        y, _ = lasp.short_convolution(x, weight, sp=sp)
        forward = count.take()
        y.sum().backward()
        backward = count.take()
    assert (forward, backward) == tuple(map(tuple, volume.halo(6, B, 4, 4, rank, size)))


@pytest.mark.parametrize(
    "size", [2, 3, pytest.param(4, marks=pytest.mark.ci), pytest.param(8, marks=pytest.mark.exhaustive)]
)
def test_counted_bytes_are_the_derived_ones(size):
    def work(rank: int) -> None:
        check_state_exchanges(rank, size)
        for name in BASELINES:
            short, long = check_baseline(name, rank, size)
            assert long == (64 * short[0], 64 * short[1]), "what is sent grows with the sequence"
        short, long = check_megatron(rank, size, SHORT), check_megatron(rank, size, LONG)
        assert long == (64 * short[0], 64 * short[1])
        check_softmax_layers(rank, size)

    run(size, work)


def test_states_of_many_ranks():
    """Steps of a power of two, and hosts in hosts, are told apart by no fewer."""
    run(8, lambda rank: check_state_exchanges(rank, 8))


def test_a_shifted_ring_is_seen():
    """The control: the comparison with one device fails where two ranks' outputs are exchanged."""

    def work(rank: int) -> float:
        qkv, _ = inputs(8, KEY_HEADS)
        o = ring_attention(*(shard(t) for t in qkv), dist.group.WORLD)  # type: ignore[arg-type, call-arg]
        return error(o, softmax(*qkv).chunk(2, 1)[1 - rank])

    assert min(run(2, work)) > 1e-3


def test_megatron_all_to_all_is_ulysses_with_more_channels():
    description = describe(16, HEADS)
    gates = HEADS * V + 2 * HEADS
    plain, more = volume.ulysses(description, 1, 4), volume.megatron_all_to_all(description, 1, 4, gates=gates)
    assert more.forward.sent_bytes - plain.forward.sent_bytes == B * 16 * gates * 8 * 3 // 4


def test_data_parallel_traffic_of_two():
    """Two ranks: what each must get is the other's half, or whole."""
    assert volume.ddp(10, 2) == (40, 40)
    assert volume.zero1(10, 2) == (60, 60)
    assert volume.zero2(10, 2) == (40, 40)
    assert volume.zero3(10, 2, parameter_itemsize=2) == (40, 40)
    assert volume.zero3(10, 2, once=4) == (52, 52)
    assert volume.zero3(10, 1) == (0, 0)
