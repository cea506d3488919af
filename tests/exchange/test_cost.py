"""The cost model against an ideal network, against figures worked out by hand, and what `auto` does with it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from simulated import run as simulate
from world import run

import lasp
from lasp.exchange import EXCHANGES, Auto, Constants, Hierarchical, Payload, Pipelined
from lasp.exchange.cost import GLOO, LINKS, NCCL, Link, Model, defaults
from lasp.exchange.measure import PROBES, fit, random_summary

MIB = Payload(heads=16, keys=128, values=128, transition=0)


def ideal(latency: float, bytes_per_s: float, **others) -> Constants:
    """A network in which every operation costs a message, and folding nothing."""
    link, free = Link(latency, bytes_per_s), Link(0.0, 1e30)
    links = {**dict.fromkeys(LINKS, link), "apply_summary": free, "apply_summary_alone": free, **others}
    return Constants(**links, flops_per_s=1e30, source="ideal")


def predicted(name: str, size: int, constants: Constants, load: Payload = MIB) -> float:
    return EXCHANGES[name]().seconds(Model(load, (size,), constants), want_total=False)


def test_figures_by_hand():
    """A state of 1 MiB, 4 us and 300 GB/s a message: microseconds worked out from the formulas of the papers."""
    constants = ideal(4e-6, 300e9)
    for size, name, micros in [
        (2, "all_gather", 7.5), (8, "all_to_all", 14.1), (8, "doubling", 22.5), (8, "all_gather", 28.5),
        (8, "ring", 52.5), (64, "all_to_all", 14.9), (64, "doubling", 45.0), (64, "all_gather", 224.2),
        (64, "ring", 472.2),
    ]:  # fmt: skip
        assert predicted(name, size, constants) * 1e6 == pytest.approx(micros, rel=5e-3), (size, name)
    # ZeCO's optimum: P = sqrt(62 x 3.495 / 4) = 7.4 blocks, and the power of two next to it.
    model = Model(MIB, (64,), constants)
    assert model.best_blocks() == 8
    assert Pipelined().seconds(model, want_total=False) == pytest.approx((62 + 8) * (4e-6 + 2**20 / 300e9 / 8))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("name", ["ring", "all_gather", "pipelined", "doubling", "all_to_all"])
def test_formulas_on_an_ideal_network(name, size):
    """The schedule run on simulated ranks takes what it declares, of states from small to large."""
    for latency, bytes_per_s in ((1e-6, 1e9), (1e-4, 1e9), (1e-5, 1e8)):
        constants = ideal(latency, bytes_per_s)
        for load in (Payload(13, 8, 8, 1), Payload(26, 4, 8, 16)):
            exchange = Pipelined(constants=constants) if name == "pipelined" else EXCHANGES[name]()

            def work(comm, load=load, exchange=exchange):
                summary, initial = random_summary(load, comm.rank, torch.device("cpu"))
                exchange.begin(comm, summary, initial, reverse=False, want_total=False).wait()
                return comm.time

            def duration(kind, nbytes, link=constants.message):
                return link.seconds(nbytes)

            clock = max(simulate(size, work, duration=duration))
            declared = exchange.seconds(Model(load, (size,), constants), want_total=False)
            if name == "doubling":  # the first ranks do not wait for the others' steps
                assert 0.5 * declared < clock <= declared * (1 + 1e-9), load
            else:  # blocks and slices are cut at whole heads, so that the largest is a little more than its share
                rel = 0.12 if name in ("pipelined", "all_to_all") else 1e-9
                assert clock == pytest.approx(declared, rel=rel), load


def test_rounds():
    """Compares how long the chain of messages is: the papers' step counts, and the two levels."""
    load = Payload(8, 2, 2, 1)

    def rounds(exchange, size, nodes=None):
        def work(comm):
            summary, initial = random_summary(load, comm.rank, torch.device("cpu"))
            exchange.begin(comm, summary, initial, reverse=False, want_total=False).wait()
            return comm.time

        return max(simulate(size, work, nodes=nodes))

    for size in (2, 3, 5, 8, 9):
        assert rounds(EXCHANGES["ring"](), size) == size - 1
        assert rounds(EXCHANGES["all_gather"](), size) == 1
        assert rounds(EXCHANGES["all_to_all"](), size) == 2
        assert rounds(EXCHANGES["doubling"](), size) <= (size - 1).bit_length()
    assert [rounds(EXCHANGES["doubling"](), size) for size in (2, 4, 8, 16)] == [1, 2, 3, 4]
    # Inside, two doubling steps over the four leaders, inside.
    assert rounds(Hierarchical(), 16, (4, 4, 4, 4)) == 4


def test_where_each_schedule_wins():
    """The model chooses what its reasons say: chains where messages are cheap, few rounds where they are not."""
    slow_start, one = ideal(1e-3, 1e10), (8,)
    assert Auto(slow_start).choose(MIB, one).name == "all_gather"
    assert Auto(ideal(4e-6, 300e9)).choose(MIB, one).name == "all_to_all"
    assert Auto(ideal(1e-5, 1e8)).choose(MIB, one).name.startswith("pipelined")
    cores_shared = ideal(1e-5, 1e9, shift=Link(1e-4, 1e8), gather=Link(1e-4, 1e8), all_to_all=Link(1e-4, 1e8))
    assert Auto(cores_shared).choose(MIB, one).name == "ring"
    streaming = ideal(1e-6, 1e9, gather=Link(1e-6, 1e8), all_to_all=Link(1e-6, 1e8))
    assert Auto(streaming).choose(MIB, (4,)).name.startswith("pipelined")
    assert Auto(NCCL).choose(MIB, (8,) * 32).name.startswith("hierarchical")
    assert Auto(NCCL).choose(MIB, (1,)).name == "local"


def test_the_choice_explains_itself():
    text = Auto(NCCL).explain(MIB, (8, 8))
    lines = text.splitlines()
    assert "16 ranks on 2 hosts" in lines[0] and "1,048,576 bytes" in lines[0] and "defaults for NCCL" in lines[0]
    assert lines[2].split()[0] == lines[-1].removeprefix("chosen: ").split()[0]
    assert {line.split()[0].rstrip(",") for line in lines[2:-1]} >= {"ring", "all_gather", "doubling", "all_to_all"}
    assert [float(line[40:53]) for line in lines[2:-1]] == sorted(float(line[40:53]) for line in lines[2:-1])


def test_constants_in_a_file(tmp_path):
    path = tmp_path / "constants.json"
    GLOO.save(path)
    assert Constants.load(path) == GLOO and defaults("gloo") is GLOO and defaults("nccl") is NCCL
    good = json.loads(path.read_text())
    for earlier, now in (("swap", "all_to_all"), ("fold", "apply_summary"), ("fold_alone", "apply_summary_alone")):
        good[earlier] = good.pop(now)
    path.write_text(json.dumps(good))
    assert Constants.load(path) == GLOO, "as an earlier version wrote it"
    for damage in (
        {"message": [1e-6]},
        {"message": [1e-6, 0.0, 0.0]},
        {"fold": [-1.0, 1e9, 0.0]},
        {"flops_per_s": 0},
        {"colour": "red"},
        {"gather": ["fast", 1.0, 1.0]},
    ):
        path.write_text(json.dumps({**good, **damage}))
        with pytest.raises(ValueError, match="does not hold constants"):
            Constants.load(path)
    for text in ("", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="lasp bench exchange --save"):
            Constants.load(path)
    with pytest.raises(ValueError, match="does not hold"):
        Constants.load(tmp_path / "missing.json")


def test_fit_recovers_a_link():
    link = Link(3e-5, 2e9)
    found = fit(PROBES, [link.seconds(n) for n in PROBES])
    assert found.latency_s == pytest.approx(3e-5) and found.bytes_per_s == pytest.approx(2e9)
    assert fit(PROBES, [1e-4] * 4).latency_s == pytest.approx(1e-4), "no bytes, only latency"
    negative = fit(PROBES, [n / 1e9 * (1 + n / 4e6) for n in PROBES])
    assert negative.latency_s >= 0 and negative.bytes_per_s > 0


def test_ranks_with_other_constants_are_told():
    """They might choose differently: an error on all, before anything is sent."""

    def work(rank: int) -> str:
        constants = dataclasses.replace(GLOO, flops_per_s=1e9 + rank)
        sp = lasp.SequenceParallel(dist.group.WORLD, exchange=Auto(constants), timeout_s=20)
        q = torch.ones(1, 4, 1, 2)
        try:
            lasp.linear_attention(q, q, q, sp=sp)
        except lasp.ExchangeError as error:
            return str(error)
        return ""

    first, second = run(2, work)
    assert first == second and "exchange: rank 0 has auto by constants" in first


def test_auto_across_ranks():
    """`auto` chooses when it sees the sizes, anew for other sizes."""

    def work(rank: int) -> list:
        outputs = []
        for constants in (GLOO, ideal(1e-3, 1e10), ideal(1e-5, 1e8)):
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=Auto(constants))
            for heads in (1, 8):
                q = torch.arange(8.0 * heads).reshape(1, 4, heads, 2).sin() + rank
                outputs.append(lasp.linear_attention(q, q, q, sp=sp)[0].tolist())
        return outputs

    for outputs in run(3, work):
        for heads, other in ((0, 2), (0, 4), (1, 3), (1, 5)):
            assert torch.allclose(torch.tensor(outputs[heads]), torch.tensor(outputs[other]), rtol=1e-5)
