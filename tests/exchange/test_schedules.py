"""Every schedule alone: random summaries of every kind, any number of ranks, against the scan of the algebra."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated import DeadlockError, run
from tolerances import relative_error

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary, scan
from lasp.exchange import EXCHANGES, ExchangeResult, Hierarchical, Payload, Pipelined
from lasp.exchange.schedules.doubling import Doubling
from lasp.exchange.schedules.ring import Ring

KINDS = ("identity", "scalar", "diagonal", "dense")
SIZES = (1, 2, 3, 4, 5, 8)
# Batch, heads, K, V: more heads than ranks; fewer heads than ranks but enough columns; fewer of both.
SHAPES = ((2, 5, 4, 3), (1, 2, 4, 9), (1, 1, 3, 2))
SCHEDULES = {
    **{name: make() for name, make in EXCHANGES.items()},
    "pipelined in 3": Pipelined(blocks=3),
    "pipelined in 40": Pipelined(blocks=40),
    "hierarchical by 2": Hierarchical(ranks_per_node=2),
    "hierarchical by 3, ring": Hierarchical(ranks_per_node=3, across=Ring()),
    "hierarchical by 1, doubling": Hierarchical(ranks_per_node=1, across=Doubling()),
}


def summaries(kind: str, count: int, shape: tuple[int, ...], seed: int = 0, dtype=torch.float64) -> Summary:
    """`count` random summaries stacked along the leading axis."""
    random = torch.Generator().manual_seed(seed)
    *heads, keys, values = shape

    def normal(*tail):
        return torch.randn(count, *heads, *tail, generator=random, dtype=torch.float64).to(dtype)

    transition = {
        "identity": lambda: Identity(),
        "scalar": lambda: Scalar(-0.3 * normal().abs()),
        "diagonal": lambda: Diagonal(-0.3 * normal(keys).abs()),
        "dense": lambda: Dense(0.6 * normal(keys, keys)),
    }[kind]()
    return Summary(transition, normal(keys, values))


def expected(runs: Summary, initial, reverse: bool):
    return scan(runs, initial, reverse=reverse)


def carry(exchange, runs: Summary, initial, *, reverse: bool, want_total: bool, seed: int = 0, nodes=None):
    """The exchange on one simulated rank a summary: what each rank gets, and its counters."""

    def work(comm):
        pending = exchange.begin(comm, runs[comm.rank], initial, reverse=reverse, want_total=want_total)
        return pending.wait(), comm.counters

    return run(runs.state.shape[0], work, seed=seed, nodes=nodes)


def nodes_of(exchange, size: int) -> tuple[int, ...]:
    flat: Any = SimpleNamespace(nodes=(size,), size=size)
    return exchange.nodes(flat) if isinstance(exchange, Hierarchical) else (size,)


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_scan(name):
    """Entering states, total, bytes: every kind, size, shape and direction. Which rank runs when is random."""
    exchange = SCHEDULES[name]
    for seed, (kind, size, shape) in enumerate(itertools.product(KINDS, SIZES[1:], SHAPES)):
        runs = summaries(kind, size, shape)
        initial = summaries("identity", 1, shape, seed=1).state[0]
        load = Payload.of(runs[0])
        for reverse, want_total in itertools.product((False, True), repeat=2):
            case = (kind, size, shape, reverse, want_total)
            entering, total = expected(runs, initial, reverse)
            results = carry(exchange, runs, initial, reverse=reverse, want_total=want_total, seed=seed)
            nodes = nodes_of(exchange, size)[:: -1 if reverse else 1]
            for rank, (carried, counters) in enumerate(results):
                assert relative_error(carried.entering, entering[rank]) < 1e-13, (*case, rank)
                assert (carried.total is not None) == want_total
                if want_total:
                    assert relative_error(carried.total, total) < 1e-13, (*case, rank)
                position = size - 1 - rank if reverse else rank
                declared = exchange.traffic(load, position, nodes, want_total=want_total)
                assert (counters.sent_bytes, counters.received_bytes) == tuple(declared), (*case, rank)


@pytest.mark.parametrize("name", SCHEDULES)
def test_repeats_bit_for_bit(name):
    """Any order of events gives the same bits; and where no two transitions are composed, those of the chain."""
    runs = summaries("diagonal", 5, (2, 3, 4, 3), dtype=torch.float32)
    initial = torch.zeros(2, 3, 4, 3)
    results = [
        [
            carried.entering
            for carried, _ in carry(SCHEDULES[name], runs, initial, reverse=True, want_total=False, seed=seed)
        ]
        for seed in range(6)
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    if not name.startswith(("doubling", "hierarchical")):
        chain = carry(Ring(), runs, initial, reverse=True, want_total=False)
        assert all(torch.equal(a, b.entering) for a, (b, _) in zip(results[0], chain, strict=True))


def test_hosts_of_any_size():
    """The levels follow the hosts that the ranks are on: ragged, single, in both directions."""
    for nodes in ((3, 1, 2), (1, 4), (4, 1), (2, 2, 1), (1, 1, 1)):
        size = sum(nodes)
        runs = summaries("dense", size, (1, 2, 4, 3))
        initial = torch.ones(1, 2, 4, 3, dtype=torch.float64)
        for reverse in (False, True):
            entering, total = expected(runs, initial, reverse)
            for rank, (carried, counters) in enumerate(
                carry(Hierarchical(), runs, initial, reverse=reverse, want_total=True, nodes=nodes)
            ):
                assert relative_error(carried.entering, entering[rank]) < 1e-13
                assert relative_error(carried.total, total) < 1e-13
                position = size - 1 - rank if reverse else rank
                declared = Hierarchical().traffic(
                    Payload.of(runs[0]), position, nodes[:: -1 if reverse else 1], want_total=True
                )
                assert (counters.sent_bytes, counters.received_bytes) == tuple(declared)


def test_bytes_of_the_papers():
    """Declared traffic, written out for 4 ranks, a state of 400 bytes and one number of decay a head."""
    load = Payload(heads=4, keys=5, values=5, transition=1)
    summary = 416

    def traffic(name, want_total=False):
        return [tuple(SCHEDULES[name].traffic(load, p, (4,), want_total=want_total)) for p in range(4)]

    assert traffic("ring") == traffic("pipelined in 3") == [(400, 0), (400, 400), (400, 400), (0, 400)]
    assert traffic("all_gather") == [(3 * summary, 3 * summary)] * 4
    # Rank 0 knows the state from the start, rank 1 after the first step: they send states, rank 2 a summary.
    assert traffic("doubling") == [(800, 0), (400 + summary, 400), (summary, 400 + summary), (0, summary + 400)]
    # A quarter of every summary there (the last rank's is not needed), a quarter of a state back (not to the first).
    assert traffic("all_to_all") == [
        (312 + 300, 208), (312 + 200, 208 + 300), (312 + 200, 208 + 300), (200, 312 + 300),
    ]  # fmt: skip
    # Two nodes of two: inside a summary, across a state, inside a state.
    two = [tuple(Hierarchical().traffic(load, p, (2, 2), want_total=False)) for p in range(4)]
    assert two == [(summary, 0), (400, summary), (summary, 400), (400, summary + 400)]
    assert traffic("ring", want_total=True)[0] == (400, 400), "the total costs each rank one state"


def test_dense_transitions_cross_the_chain_unsent():
    """The delta rule's ring and pipeline move states only; its all-to-all cuts along heads, transitions with them."""
    load = Payload(heads=8, keys=16, values=16, transition=256)
    for name in ("ring", "pipelined"):
        assert SCHEDULES[name].traffic(load, 1, (4,), want_total=False).received_bytes == load.state_bytes
    assert SCHEDULES["all_to_all"].traffic(load, 0, (4,), want_total=False).received_bytes == load.summary_bytes // 2


class Mistaken(Ring):
    """A ring with a mistake in it."""

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def begin(self, comm, summary, initial, *, reverse, want_total):
        if self.mistake == "nobody starts" and comm.rank == (comm.size - 1 if reverse else 0):
            comm.receive(summary.state, comm.rank ^ 1).wait()
        pending = super().begin(comm, summary, initial, reverse=reverse, want_total=want_total)

        class Wrong:
            def wait(_):
                carried = pending.wait()
                swapped = summary.apply(carried.entering) if self.mistake == "off by one" else carried.entering
                return ExchangeResult(swapped, carried.total)

        return Wrong()


def test_the_comparison_can_fail():
    """Controls: a wrong state is seen, and a deadlock ends at once as one."""
    runs = summaries("scalar", 3, (1, 2, 4, 3))
    initial = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    entering, _ = expected(runs, initial, False)
    wrong = carry(Mistaken("off by one"), runs, initial, reverse=False, want_total=False)
    assert all(relative_error(carried.entering, entering[rank]) > 1e-2 for rank, (carried, _) in enumerate(wrong))
    with pytest.raises(DeadlockError, match="all wait"):
        carry(Mistaken("nobody starts"), runs, initial, reverse=False, want_total=False)


def test_a_slice_along_k_would_be_wrong_for_the_delta_rule():
    """The pipeline does not cut along K as ZeCO does: with a dense transition the rows mix."""
    runs = summaries("dense", 3, (1, 1, 4, 3))
    initial = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    entering, _ = expected(runs, initial, False)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = Summary(Dense(runs.transition.matrix[..., rows, rows]), runs.state[..., rows, :])
        halves.append(expected(part, initial[..., rows, :], False)[0])
    assert relative_error(torch.cat(halves, -2), entering) > 1e-2
