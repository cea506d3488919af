"""Programs of two ranks that are at different calls, and such that are not: what each rank raises.

    torchrun --nproc-per-node 2 tests/distributed/calls.py [cpu|cuda|nccl] [SCHEDULE ...]

Runs the schedules, all of them or those named, over gloo, on CPUs or with both processes on one GPU, or over NCCL with
a GPU for each. Of each the first rank prints, as a line of JSON, how many programs were told apart and the longest that
any of them took. It exits with 1 where one was not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.distributed.groups import new_group
from lasp.exchange import EXCHANGES

SCHEDULES = ("auto", *EXCHANGES)
DOCUMENTS = ([0, 3, 16], [0, 8, 16], [0, 1, 2, 13, 16])


class Ranks:
    """One rank's view: two global tensors, the same on every rank, and the operators on them."""

    def __init__(self, sp: lasp.SequenceParallel, device: str) -> None:
        self.sp, self.rank = sp, sp.rank
        random = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(1, 16, 2, 4, generator=random, dtype=torch.float64).to(device) for _ in range(2))

    def linear(self, whole: Tensor, **options: Any) -> Tensor:
        """Given the shards themselves, which know the tensor that they are of."""
        shard = self.sp.shard(whole)
        return lasp.linear_attention(shard, shard, shard, sp=self.sp, backend="torch", **options)[0]

    def loss(self, whole: Tensor, operator: str = "linear_attention", **options: Any) -> Tensor:
        return self.apply(self.sp.shard(whole).clone().requires_grad_(), operator, **options)[0].square().sum()

    def apply(self, x: Tensor, operator: str, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The outputs for a shard, and the final state or None."""
        flat, sp = x.flatten(2), self.sp
        calls: dict[str, Callable[[], Any]] = {
            "linear_attention": lambda: lasp.linear_attention(x, x, x, sp=sp, backend="torch", **options),
            "delta_rule": lambda: lasp.delta_rule(x, x, x, x[..., 0].sigmoid(), sp=sp, normalize_qk=True, **options),
            "short_convolution": lambda: lasp.short_convolution(flat, flat[0, :3].T.contiguous(), sp=sp, **options),
            "token_shift": lambda: lasp.token_shift(flat, sp=sp, **options),
            "softmax_attention": lambda: lasp.softmax_attention(x, x, x, sp=sp, **options),
            "ulysses": lambda: lasp.softmax_attention(x, x, x, sp=sp, method="ulysses", **options),
        }
        return calls[operator]()


OPERATORS = ("linear_attention", "delta_rule", "short_convolution", "token_shift", "softmax_attention", "ulysses")


def skipped(ranks: Ranks, operator: str) -> None:
    """A backward pass that one rank leaves out: found at its next call."""
    for step in range(2):
        loss = ranks.loss(ranks.a, operator)
        if ranks.rank == 0 or step == 1:
            loss.backward()


def swapped(ranks: Ranks, operator: str) -> None:
    """Two backward passes in another order."""
    losses = ranks.loss(ranks.a, operator), ranks.loss(ranks.b, operator)
    for loss in losses if ranks.rank == 0 else losses[::-1]:
        loss.backward()


def other_tensor(ranks: Ranks, operator: str) -> None:
    """Shards of two tensors in another order."""
    for whole in (ranks.a, ranks.b) if ranks.rank == 0 else (ranks.b, ranks.a):
        ranks.linear(whole)


def doubled(ranks: Ranks, operator: str) -> None:
    """A layer that one rank runs twice."""
    loss = ranks.loss(ranks.a, operator)
    if ranks.rank == 1:
        ranks.loss(ranks.a, operator)
    loss.backward()


def other_documents(ranks: Ranks, operator: str) -> None:
    """Documents that both ranks have had, on one rank in the place of others."""
    for documents in (*DOCUMENTS[:2], DOCUMENTS[ranks.rank]):
        ranks.loss(ranks.a, operator, cu_seqlens=documents).backward()


def other_step(ranks: Ranks, operator: str) -> None:
    """Another step's tokens, of the same shape."""
    ranks.sp.begin_step(3)
    ranks.loss(ranks.a, operator)
    ranks.sp.begin_step(4 + ranks.rank)
    ranks.loss(ranks.b, operator)


def other_data(ranks: Ranks, operator: str) -> None:
    """The same step of two readers of data."""
    ranks.sp.begin_step(3, data=("position", ranks.rank))
    ranks.loss(ranks.b, operator)


def no_grad(ranks: Ranks, operator: str) -> None:
    """A rank that evaluates while the other trains."""
    with torch.set_grad_enabled(ranks.rank == 0):
        ranks.loss(ranks.a, operator)


def invalid(ranks: Ranks, operator: str) -> None:
    """A rank whose input is refused, long after the first call."""
    ranks.loss(ranks.a, operator, cu_seqlens=DOCUMENTS[0] if ranks.rank == 0 else [0, 5])


# What all ranks must say of each.
WRONG: dict[Callable[[Ranks, str], None], str] = {
    skipped: "backward of",
    swapped: "call whose gradients these are: rank 0 has",
    other_tensor: "global tensor that argument 1 is a shard of",
    doubled: "backward of",
    other_documents: "documents: rank 0 has 2 documents",
    other_step: "step: rank 0 has 4, rank 1 has 5",
    other_data: "data of the step: rank 0 has",
    no_grad: "rank 0 has",
    invalid: "rank 1: cu_seqlens must rise",
}


def right(ranks: Ranks) -> None:
    """The control: programs whose ranks make the same calls, though not the plainest ones."""
    ranks.sp.begin_step(0)
    for documents in (*DOCUMENTS, None):  # other documents in every step
        for operator in OPERATORS:
            ranks.loss(ranks.a, operator, cu_seqlens=documents).backward()
    first, second = ranks.loss(ranks.a), ranks.loss(ranks.b, "token_shift")
    (first + second).backward()
    with torch.no_grad():
        ranks.loss(ranks.a)
    x = ranks.a.clone().requires_grad_()
    checkpoint(ranks.loss, x, use_reentrant=False).backward()
    ranks.linear(ranks.a)
    # Known on one rank only: that matches everything.
    shard = ranks.sp.shard(ranks.b if ranks.rank == 0 else ranks.b.clone())
    shard = shard if ranks.rank == 0 else shard.clone()
    lasp.linear_attention(shard, shard, shard, sp=ranks.sp)


def told_apart(
    device: str, schedules: Iterable[str], operators: Iterable[str] = OPERATORS[:1]
) -> list[tuple[str, str, str, float]]:
    """(program, what it must say, what this rank said, seconds) of every wrong program, one after another in one group
    a schedule: ranks that differed once are together again at the next call."""
    found = []
    for schedule in schedules:
        ranks = Ranks(lasp.SequenceParallel(dist.group.WORLD, exchange=schedule, timeout_s=60), device)
        right(ranks)
        for operator in operators:
            for program, expected in WRONG.items():
                start, said = time.monotonic(), "no error"
                try:
                    program(ranks, operator)
                except lasp.ExchangeError as error:
                    said = str(error)
                found.append((f"{schedule} {operator} {program.__name__}", expected, said, time.monotonic() - start))
                ranks.sp.begin_step(0)
            right(ranks)
    return found


def told_apart_over_nccl(device: str, schedule: str) -> list[tuple[str, str, str, float]]:
    """The same over NCCL, where an error ends the group: every program in a group of its own, let go of after it.

    A rank raises at one of the calls that follow. Shards are not compared there (`SequenceParallel.shard`).
    """
    found = []
    for program in [program for program in WRONG if program is not other_tensor]:
        group = new_group(backend="nccl", timeout=timedelta(seconds=60))
        ranks = Ranks(lasp.SequenceParallel(group, exchange=schedule, timeout_s=40), device)
        right(ranks)
        torch.cuda.synchronize()
        start, said = time.monotonic(), "no error"
        try:
            program(ranks, OPERATORS[0])
            for _ in range(3):
                torch.cuda.synchronize()
                ranks.loss(ranks.a).backward()
        except lasp.ExchangeError as error:
            said = str(error)
        found.append((f"{schedule} {program.__name__}", "", said, time.monotonic() - start))
        if ranks.rank == 0:
            print(found[-1], file=sys.stderr, flush=True)
        # Once no rank will wait any more: an alarm has aborted some communicators, those of messages between two ranks
        # too, and the others, whose peers are gone, could be ended in no other way. Each has shared memory.
        dist.barrier()
        ranks.sp.comm.alarm.stop()
        _abort_process_group(group)
        torch.cuda.synchronize()
    return found


def main() -> None:
    mode, *names = sys.argv[1:] or ["cpu"]
    over_nccl = mode == "nccl"
    schedules = (*SCHEDULES, "peer") if over_nccl else SCHEDULES
    if unknown := set(names) - set(schedules):
        sys.exit(f"unknown schedules: {', '.join(sorted(unknown))}; known: {', '.join(schedules)}")
    device = {"cpu": "cpu", "cuda": "cuda:0", "nccl": f"cuda:{os.environ['LOCAL_RANK']}"}[mode]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if over_nccl:
        torch.cuda.set_device(device)
    all_told_apart = True
    for schedule in names or schedules:
        everywhere: list[Any] = [None] * dist.get_world_size()
        own = told_apart_over_nccl(device, schedule) if over_nccl else told_apart(device, [schedule], OPERATORS)
        dist.all_gather_object(everywhere, own)
        bad = [
            (first[0], first[2:], second[2:]) if over_nccl else first[0]
            for first, second in zip(*everywhere, strict=True)
            if (not over_nccl and first[2] != second[2])
            or any(each[1] not in each[2] or each[2] == "no error" or each[3] > 10 for each in (first, second))
        ]
        all_told_apart = all_told_apart and not bad
        if int(os.environ["RANK"]) == 0:
            slowest = max(seconds for each in everywhere for *_, seconds in each)
            line = {"schedule": schedule, "programs": len(own), "slowest_s": round(slowest, 3), "not told apart": bad}
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()
    sys.exit(not all_told_apart)


if __name__ == "__main__":
    main()
