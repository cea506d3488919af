"""The simulator on cases whose answer is known, and a step at a scale no machine here has."""

from __future__ import annotations

import pytest

from lasp.analysis.simulator import Join, Receive, Send, SimulatedMachine, SimulatedWork, Wait, simulate
from lasp.analysis.step import Pieces, Step, program
from lasp.exchange import EXCHANGES, Payload
from lasp.exchange.cost import NCCL, Link, Model

FAST = Link(1.0, 10.0)
SLOW = Link(3.0, 5.0)


def test_a_chain_of_messages():
    """Work 2, message of 20 bytes: 1 + 2 in a host, 3 + 4 between hosts."""

    def run(rank):
        if rank > 0:
            yield Receive(rank - 1)
        yield SimulatedWork(2.0)
        if rank < 2:
            yield Send(rank + 1, 20)

    assert simulate(SimulatedMachine((2, 1), FAST, SLOW), run) == [2.0, 7.0, 16.0]


def test_ranks_share_cores():
    """Three of work 4 on two cores: 6; when one ends early, the others speed up."""
    assert simulate(SimulatedMachine((3,), FAST, SLOW, cores=2), lambda rank: iter([SimulatedWork(4.0)])) == [6.0] * 3
    ends = simulate(
        SimulatedMachine((3,), FAST, SLOW, cores=2), lambda rank: iter([SimulatedWork(2.0 if rank == 0 else 4.0)])
    )
    assert ends == pytest.approx([3.0, 5.0, 5.0])


def test_a_collective_waits_for_the_slowest_and_hides_behind_work():
    def run(rank):
        yield SimulatedWork(1.0)
        yield Join("a", 5.0)
        yield SimulatedWork(2.0)
        yield Wait("a")

    assert simulate(SimulatedMachine((2,), FAST, SLOW, slowness=(1.0, 3.0)), run) == [8.0, 9.0]
    assert simulate(
        SimulatedMachine((2,), FAST, SLOW), lambda rank: iter([Join("a", 1.0), Join("b", 1.0), Wait("b")])
    ) == [2, 2]


def test_who_waits_for_nothing_is_named():
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2 wait"):
        simulate(SimulatedMachine((2,), FAST, SLOW), lambda rank: iter([Receive(0)] if rank == 1 else []))


def step(name: str, nodes: tuple[int, ...], work: float = 0.0) -> Step:
    load = Payload(16, 128, 128, 1)
    return Step(
        layers=1, forward=Pieces(work, 0.0, 0.0), backward=Pieces(0.0, 0.0, 0.0), outside_forward=0.0,
        outside_backward=0.0, optimizer=0.0, load=load, exchange=EXCHANGES[name](), name=name, constants=NCCL,
        nodes=nodes, reduce_s=lambda nbytes: 0.0, gradient_bytes=(0.0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ring", "all_gather", "doubling"])
@pytest.mark.parametrize("size", [2, 8, 64])
def test_an_exchange_alone_takes_what_its_cost_model_says(name, size):
    """Forward and back, one layer, nothing to hide behind; the ring has no contention, so exactly."""
    alone = step(name, (size,))
    found = max(simulate(SimulatedMachine((size,), NCCL.message, NCCL.across), program(alone)))
    predicted = 2 * alone.exchange.seconds(Model(alone.load, (size,), NCCL), want_total=False)
    assert found == pytest.approx(predicted, rel=0.25 if name == "doubling" else 1e-9)


def test_a_straggler_delays_a_chain_once():
    nodes, late = (8,) * 4, 5e-3
    machine = SimulatedMachine(nodes, NCCL.message, NCCL.across)
    even = max(simulate(machine, program(step("ring", nodes, 1e-3))))
    slow = tuple(1 + late / 1e-3 if rank == 3 else 1.0 for rank in range(32))
    assert max(simulate(machine._replace(slowness=slow), program(step("ring", nodes, 1e-3)))) == pytest.approx(
        even + late, rel=0.05
    )


def test_a_thousand_ranks():
    nodes = (8,) * 128
    ends = simulate(SimulatedMachine(nodes, NCCL.message, NCCL.across), program(step("doubling", nodes, 1e-3)))
    assert len(ends) == 1024 and max(ends) < 3e-3
