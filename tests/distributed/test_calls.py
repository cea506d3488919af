"""Ranks at different calls raise together and say which; the same calls pass, whatever else a rank does."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import DOCUMENTS, OPERATORS, SCHEDULES, WRONG, Ranks, told_apart
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from world import run

import lasp
from lasp.distributed.alarm import Alarm, Trail
from lasp.distributed.sealed import SealedCalls, TorchStamps


def check(schedules: tuple[str, ...], operators: tuple[str, ...]) -> None:
    first, second = run(2, lambda rank: told_apart("cpu", schedules, operators), deadline_s=600)
    assert len(first) == len(WRONG) * len(schedules) * len(operators)
    for (program, expected, said, _), (_, _, other, _) in zip(first, second, strict=True):
        assert said == other, program
        assert expected in said, (program, said)


@pytest.mark.parametrize(("schedule", "operator"), [("ring", "linear_attention"), ("auto", "softmax_attention")])
def test_wrong_programs_are_told_apart(schedule, operator):
    """`told_apart` also runs the right ones, before and between."""
    check((schedule,), (operator,))


@pytest.mark.exhaustive
def test_all_wrong_programs_are_told_apart():
    check(SCHEDULES, OPERATORS)


def test_three_ranks_hear_of_one():
    """Ranks that exchange nothing with it hear of it, and one that runs ahead of them."""

    def work(rank: int) -> str:
        sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=60)
        x = torch.ones(1, 4, 2, requires_grad=True)
        lasp.token_shift(x, sp=sp)
        try:
            lasp.token_shift(x, cu_seqlens=[0, 4, 8, 12] if rank < 2 else [0, 12], sp=sp)
        except lasp.ExchangeError as error:
            return str(error)
        return "no error"

    said = run(3, work)
    assert said[0] == said[1] == said[2] and "rank 1 has 3 documents" in said[0]


LENGTHS = (5, 0, 6, 4)  # a rank without tokens
BORDERS = (0, 5, 8, 11, 15)  # a document starts within the third rank only


def checkpointed_steps(rank: int, operator: str, use: bool) -> list[Tensor]:
    """Outputs and gradients of three steps, each a region that ends with the operator."""
    sp = lasp.SequenceParallel(dist.group.WORLD, lengths=LENGTHS, exchange="ring", timeout_s=60)
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 1, sum(LENGTHS), 4, 4, generator=random, dtype=torch.float64)
    weight = torch.randn(1, 1, 4, 4, generator=random, dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"cu_seqlens": BORDERS, "sp": sp}

    def region(x: Tensor) -> Tensor:
        x = x * weight
        flat = x.flatten(2)
        if operator == "token_shift":
            return lasp.token_shift(flat, **options)[0]
        if operator == "short_convolution":
            return lasp.short_convolution(flat, flat.new_ones(16, 3), **options)[0]
        if operator == "delta_rule":
            return lasp.delta_rule(x, x, x, x[..., 0].sigmoid(), normalize_qk=True, **options)[0]
        if operator == "linear_attention":
            return lasp.linear_attention(x, x, x, output_final_state=True, **options)[0]
        return lasp.softmax_attention(x, x, x, method=operator, sp=sp, causal=operator == "ulysses")[0]

    found = []
    for step in whole:
        x = sp.shard(step).clone().requires_grad_()
        o = checkpoint(region, x, use_reentrant=False) if use else region(x)
        o.sum().backward()
        found += [o.detach(), x.grad]
    return [*found, weight.grad]


@pytest.mark.parametrize(
    "operator", ["token_shift", "short_convolution", "linear_attention", "delta_rule", "all_gather", "ulysses"]
)
def test_regions_run_again_on_every_rank_alike(operator):
    """Other things that a rank saves, and whether it has tokens, are nothing to how far a region runs again."""

    def work(rank: int) -> bool:
        plain, again = (checkpointed_steps(rank, operator, use) for use in (False, True))
        return all(map(torch.equal, plain, again))

    assert run(len(LENGTHS), work) == [True] * len(LENGTHS)


def test_groups_beside_others():
    """A rank in more groups than others, and pairs that share a rank, made and used in turn."""

    def work(rank: int) -> list[bool]:
        dist.new_group([0])
        pairs: list[Any] = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2])]
        groups = [
            dist.group.WORLD,
            *(pair for pair, ranks in zip(pairs, ((0, 1), (1, 2)), strict=True) if rank in ranks),
        ]
        x = torch.randn(1, 12, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected, _ = lasp.linear_attention(x, x, x)
        found = []
        for sp in [lasp.SequenceParallel(group, timeout_s=60) for group in groups]:
            shard = sp.shard(x)
            o, _ = lasp.linear_attention(shard, shard, shard, sp=sp)
            found.append(torch.allclose(o, sp.shard(expected), rtol=1e-12, atol=1e-12))
        return found

    assert run(3, work) == [[True] * 2, [True] * 3, [True] * 2]


def sealed_steps(rank: int, sealing: bool, schedule: str, wrong: bool) -> list[Tensor | str]:
    """Three steps of every operator, with other documents in each; what a rank whose calls are others is told."""
    sp = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule, timeout_s=60)
    if sealing:
        sp.calls = SealedCalls(sp.comm, torch.device("cpu"), TorchStamps())
    ranks, found = Ranks(sp, "cpu"), []
    try:
        for step, documents in enumerate(DOCUMENTS):
            sp.begin_step(step)
            for operator in OPERATORS:
                x = sp.shard(ranks.a).clone().requires_grad_()
                o = ranks.apply(x, operator, cu_seqlens=documents, output_final_state=True)
                if wrong and step == 1 and rank == 0 and operator == "delta_rule":
                    continue  # a backward pass left out
                sum(each.square().sum() for each in o).backward()
                found += [*(each.detach() for each in o), x.grad]
    except lasp.ExchangeError as error:
        return [str(error)]
    return [*found, torch.tensor([sp.counters.sent_bytes, sp.counters.received_bytes, sp.counters.header_bytes])]


@pytest.mark.parametrize("schedule", ["all_gather", pytest.param("ring", marks=pytest.mark.exhaustive)])
def test_sealed_messages_bring_the_same(schedule):
    """Sealed as over NCCL, here between hosts: the same bits, and the same payload counted beside its headers."""

    def work(rank: int) -> bool:
        plain, sealed = (sealed_steps(rank, sealing, schedule, False) for sealing in (False, True))
        assert plain[-1][2] == 0 < sealed[-1][2]  # type: ignore[operator]
        return torch.equal(plain[-1][:2], sealed[-1][:2]) and all(map(torch.equal, plain[:-1], sealed[:-1]))  # type: ignore[arg-type]

    assert run(2, work) == [True] * 2


def test_sealed_messages_of_another_call_are_poisoned():
    """The rank that takes one computes NaN, and raises at its next call, naming both."""

    def work(rank: int) -> tuple[bool, str]:
        sp = lasp.SequenceParallel(dist.group.WORLD, exchange="all_gather", timeout_s=60)
        sp.calls = SealedCalls(sp.comm, torch.device("cpu"), TorchStamps())
        ranks = Ranks(sp, "cpu")
        for whole in (ranks.a, ranks.b):
            ranks.loss(whole).backward()
        lost = ranks.loss(ranks.a)
        if rank == 0:
            lost.backward()
        # The other's forward pass meets this rank's backward pass: two all-gathers of one size.
        o = ranks.loss(ranks.a) if rank == 1 else lost
        try:
            ranks.loss(ranks.a)
        except lasp.ExchangeError as error:
            return not o.isfinite(), str(error)
        return not o.isfinite(), "no error"

    (_, first), (poisoned, second) = run(2, work)
    backward, forward = "backward of linear_attention of call 5", "linear_attention"
    assert poisoned
    for said, own, other in ((first, backward, forward), (second, forward, backward)):
        assert f"it was at call 6, {own}\n" in said and said.endswith(f"the message was of call 6, {other}"), said


class Names:
    def of(self, words: Sequence[int]) -> str:
        return f"operator {words[0]}"


# What two ranks do: begin a call, refuse their input, or fail.
PROGRAMS = {
    "by both, and one goes on": ("cr", "crc", False),
    "by one": ("cr", "c", True),
    "by one, and the other goes on": ("cr", "cc", True),
    "twice by one": ("crr", "crc", True),
    "elsewhere": ("cr", "ccr", True),
    "out of step": ("cf", "c", True),
}


@pytest.mark.parametrize("programs", PROGRAMS)
def test_an_alarm_ends_what_a_rank_waits_for(programs):
    """Waits as over NCCL, where nothing of the program runs meanwhile: unless both refuse their input, in step.

    Whether a rank comes to the same point is seen of its calls, and waited for only where it begins none.
    """
    *words, ended = PROGRAMS[programs]
    store, aborted, names, trails = dist.HashStore(), [Event(), Event()], Names(), [Trail(), Trail()]
    grace_s = 1.0 if programs == "by one" else 600.0
    alarms = [Alarm(dist.PrefixStore("group", store), rank, 2, aborted[rank].set, grace_s=grace_s) for rank in range(2)]
    for rank in (1, 0):  # the other has done all when it hears
        alarms[rank].follow(trails[rank], names.of)
        for what in words[rank]:
            if what == "c":
                trails[rank].add(1)
            else:
                alarms[rank].raised(f"rank {rank}: refused", unless_all=what == "r")
    assert aborted[1].wait(10.0 if ended else 1.5) == ended
    for alarm in alarms:
        alarm.stop()
    assert alarms[1].said == ("rank 0: refused" if ended else None)
    if not ended:
        assert alarms[0].said is None and not aborted[0].is_set()


@pytest.mark.parametrize("wrong", [False, True], ids=["in step", "out of step"])
def test_ranks_that_wait_for_each_other_compare_their_calls(wrong):
    """Waits as over NCCL, where each expects a message of another call and finds none; a late rank is no such."""
    names = Names()
    store, aborted = dist.HashStore(), [Event(), Event()]
    alarms = [Alarm(dist.PrefixStore("group", store), rank, 2, aborted[rank].set) for rank in range(2)]
    for rank, calls in enumerate([(1, 2, 3), (1, 4 if wrong else 2)]):
        trail = Trail()
        for call in calls:
            trail.add(call)
        alarms[rank].follow(trail, names.of)
    assert [event.wait(10.0 if wrong else 1.5) for event in aborted] == [wrong] * 2
    for alarm in alarms:
        alarm.stop()
    first, second = (alarm.said for alarm in alarms)
    assert first == second, "both raise the same"
    if wrong:
        assert "rank 0: call 2, operator 2" in first and "rank 1: call 2, operator 4" in first
