"""Bytes on the wire: counted where torch.distributed is called, equal to the formula, whatever the length."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from problems import make
from world import run

import lasp
from lasp.distributed import comm as comm_module
from lasp.exchange import EXCHANGES, Payload

B, H, K, V = 2, 3, 5, 7
STATE = B * H * K * V * 4
TRANSITION = {"none": 0, "constant": 1, "scalar": 1, "channel": K}  # numbers a head


class Wire:
    """Counts the payload of the calls that torch.distributed itself receives, apart from the library's counters."""

    def __init__(self, monkeypatch) -> None:
        self.sent = self.received = 0
        real_gather, real_send, real_receive, real_broadcast, real_all_to_all = (
            comm_module._all_gather, dist.isend, dist.irecv, dist.broadcast, dist.all_to_all_single,
        )  # fmt: skip

        def gather(output, tensor, **keywords):
            others = dist.get_world_size(keywords["group"]) - 1
            self.sent += tensor.nbytes * others
            self.received += output.nbytes - tensor.nbytes
            return real_gather(output, tensor, **keywords)

        def send(tensor, **keywords):
            self.sent += tensor.nbytes
            return real_send(tensor, **keywords)

        def receive(tensor, **keywords):
            self.received += tensor.nbytes
            return real_receive(tensor, **keywords)

        def broadcast(tensor, **keywords):
            group = keywords["group"]
            if dist.get_rank(group) == keywords["group_src"]:
                self.sent += tensor.nbytes * (dist.get_world_size(group) - 1)
            else:
                self.received += tensor.nbytes
            return real_broadcast(tensor, **keywords)

        def all_to_all(output, tensor, output_sizes, input_sizes, **keywords):
            rank = dist.get_rank(keywords["group"])
            self.sent += (tensor.numel() - input_sizes[rank]) * tensor.element_size()
            self.received += (output.numel() - output_sizes[rank]) * tensor.element_size()
            return real_all_to_all(output, tensor, output_sizes, input_sizes, **keywords)

        monkeypatch.setattr(comm_module, "_all_gather", gather)
        monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
        monkeypatch.setattr(dist, "isend", send)
        monkeypatch.setattr(dist, "irecv", receive)
        monkeypatch.setattr(dist, "broadcast", broadcast)


def step(sp: lasp.SequenceParallel, gate: str, tokens: int) -> tuple[int, int]:
    """Forward and backward of one layer in fp32; bytes this rank sent and received, by the library's count."""
    problem = make(gate, batch=B, tokens=tokens, heads=H, value_heads=H, keys=K, values=V)
    inputs = {name: t.float() for name, t in problem.inputs.items() if t is not None}
    inputs = {name: t if t.dim() == 1 or name == "initial_state" else sp.shard(t) for name, t in inputs.items()}
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    sp.counters.reset()
    o, _ = lasp.linear_attention(*(leaves.get(name) for name in "qkvg"), sp=sp)
    o.sum().backward()
    return sp.counters.sent_bytes, sp.counters.received_bytes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_equal_the_formula(size, monkeypatch):
    def work(rank: int) -> None:
        wire = Wire(monkeypatch)
        for name in EXCHANGES:
            for gate, transition in TRANSITION.items():
                sp = lasp.SequenceParallel(dist.group.WORLD, exchange=name)
                counted = []
                for tokens in (size * 4, size * 32):
                    wire.sent = wire.received = 0
                    library = step(sp, gate, tokens)
                    assert library == (wire.sent, wire.received), (name, gate, tokens)
                    counted.append(library)
                assert counted[0] == counted[1], "a sequence 8 times longer sends what the short one does"
                exchange = EXCHANGES[name]()
                load = Payload(B * H, K, V, transition)
                assert load.state_bytes == STATE
                # Constant decays are known to all ranks; none of these forgets over so short a shard.
                knows = (name, gate) == ("reach", "constant")
                known = {"known": torch.zeros(size, B * H, dtype=torch.bool)} if knows else {}
                forward = exchange.traffic(load, rank, (size,), want_total=False, **known)
                backward = exchange.traffic(load, size - 1 - rank, (size,), want_total=False, **known)
                assert counted[0] == tuple(forward + backward), (name, gate)

    run(size, work)


def test_final_state_costs_one_broadcast_over_the_ring():
    def work(rank: int) -> tuple[int, int]:
        sp = lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
        q = torch.ones(1, 4, 1, 2)
        lasp.linear_attention(q, q, q, sp=sp, output_final_state=True)
        expected = sp.exchange.traffic(Payload(1, 2, 2, 0), rank, (3,), want_total=True)
        assert (sp.counters.sent_bytes, sp.counters.received_bytes) == tuple(expected)

    run(3, work)


def test_unmasked_attention_is_one_exchange_each_way():
    """Bidirectional: every rank gets the state of all tokens, and its gradient, by one exchange with a total."""

    def work(rank: int) -> None:
        for name in EXCHANGES:
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=name)
            q = torch.ones(1, 4, 1, 2, requires_grad=True)
            o, _ = lasp.linear_attention(q, q, q, sp=sp, causal=False)
            forward = sp.counters.sent_bytes, sp.counters.received_bytes
            o.sum().backward()
            both = sp.counters.sent_bytes, sp.counters.received_bytes
            expected = [
                EXCHANGES[name]().traffic(Payload(1, 2, 2, 0), place, (3,), want_total=True)
                for place in (rank, 2 - rank)
            ]
            assert forward == tuple(expected[0]) and both == tuple(expected[0] + expected[1]), name

    run(3, work)


def test_reach_knows_constant_decays():
    """Heads that forget over a shard, known beforehand: neighbours only, no question asked, and the same bits."""

    def work(rank: int) -> tuple[int, bool]:
        random = torch.Generator().manual_seed(rank)
        q, k, v = (torch.randn(1, 200, 2, 4, generator=random) for _ in range(3))
        g = torch.tensor([-1.0, -2.0])
        found = []
        for exchange in ("ring", "reach"):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            o, _ = lasp.linear_attention(*leaves, g, sp=sp)
            sp.counters.reset()
            o.sum().backward()
            found.append([o.detach(), *(leaf.grad for leaf in leaves)])
        return sp.counters.received_bytes, all(map(torch.equal, *found))

    state = 2 * 4 * 4 * 4
    assert run(4, work) == [(state, True), (state, True), (state, True), (0, True)]
