"""Processes that write into each other's memory, in Triton's interpreter: what every exchange brings, on every rank.

    python tests/kernels/triton/peer_memory.py RANKS

Prints, as JSON, each rank's largest error against summaries applied one after the other, by kind of transition; how a
wait for a rank that sends nothing ends; and the largest error of the schedule `Peer` against `AllGather`, by kind, with
one exchange begun inside another. The memories are files that all processes map.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import interpreted_fast
import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder
from world import run

from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary
from lasp.distributed.comm import Comm
from lasp.exchange.peer import exchange as peer
from lasp.exchange.peer.memory import PeerMemory, bytes_needed
from lasp.exchange.schedules.all_gather import AllGather

interpreted_fast.install()
# The interpreter runs assertions on the device only then.
interpreter_builder.options = replace(interpreter_builder.options, debug=True)
SHAPE = (1, 3, 8, 36)  # [B, H, K, V]: not a multiple of anything
SLOT_BYTES = 1 << 13
ROUNDS = 5  # more than the two that slots last


def summary(kind: str, random: torch.Generator) -> Summary:
    state = torch.randn(SHAPE, generator=random)
    if kind == "none":
        return Summary(Identity(), state)
    log_decay = -torch.rand(SHAPE[: 2 if kind == "scalar" else 3], generator=random)
    log_decay[:, 1] = -torch.inf  # a head that forgets, a NaN too
    return Summary(Scalar(log_decay) if kind == "scalar" else Diagonal(log_decay), state)


def applied(summaries: list[Summary], initial: Tensor, rank: int, reverse: bool) -> tuple[Tensor, Tensor]:
    state = entering = initial
    for source in reversed(range(len(summaries))) if reverse else range(len(summaries)):
        entering = state if source == rank else entering
        state = summaries[source].apply(state)
    return entering, state


def error(memory: PeerMemory, rank: int, size: int, kind: str, seed: int, reverse: bool) -> float:
    random = torch.Generator().manual_seed(seed)
    summaries = [summary(kind, random) for _ in range(size)]
    initial = torch.full(SHAPE, torch.nan).masked_fill(torch.arange(3).view(1, 3, 1, 1) != 1, 0.5)
    initial = None if kind == "none" else initial
    own = summaries[rank]
    stored = next(iter(own.transition.tensors()), None)
    memory.push(stored, own.state)
    found = memory.fold(initial, own.state, 0 if stored is None else stored.numel(), reverse=reverse, want_total=True)
    expected = applied(summaries, torch.zeros(SHAPE) if initial is None else initial, rank, reverse)
    gaps = [(got - wanted).nan_to_num(0.0).abs().max() for got, wanted in zip(found, expected, strict=True)]
    same = all(torch.equal(got.isnan(), wanted.isnan()) for got, wanted in zip(found, expected, strict=True))
    return max(gaps).item() if same else float("inf")


def of_another_call(memory: PeerMemory, rank: int, state: Tensor) -> list[object]:
    """Shows what a rank makes of summaries, the last rank's of which are another call's: how much is NaN, and what it
    tells the host; after summaries of one call, of which nothing may be."""
    last, results = len(memory._memories) - 1, []
    for another in (0, 1):
        header = torch.tensor([7, 0, 5, another * (rank == last)])
        for fold in (True, False):
            told = torch.zeros(8, dtype=torch.int64)
            memory.push(None, state.view(1, -1), header)
            if fold:
                whole = memory.fold(None, state.view(1, -1), 0, (header, told), reverse=False, want_total=True)[1]
            else:
                whole = memory.collect(state, 0, (header, told))
            results += [int(whole.isnan().sum()), told.tolist()]
    return results


def by_schedule(rank: int, size: int, memories: Callable[[int, str], list[Tensor]]) -> dict[str, float]:
    """Compares what `Peer` carries with what `AllGather` does."""
    peer._is_gpu = lambda device: True
    peer._Shared.follow = lambda self, device: None  # type: ignore[method-assign]  # there are no streams
    peer.symmetric_memory = lambda comm, nbytes, device: memories(nbytes, f"schedule {nbytes}")
    comm, found = Comm(dist.group.WORLD, 10.0), {}
    for kind in ("none", "scalar", "channel", "dense"):
        worst = 0.0
        for reverse, with_initial in ((False, True), (True, False)):
            random = torch.Generator().manual_seed(rank)
            own = summary("none" if kind == "dense" else kind, random)
            if kind == "dense":
                own = Summary(Dense(torch.randn(*SHAPE[:3], SHAPE[2], generator=random)), own.state)
            initial = torch.ones(SHAPE) if with_initial else None
            options = {"reverse": reverse, "want_total": True}
            pending = [
                peer.Peer().begin(comm, own, initial, **options) for _ in range(2)
            ]  # the second within the first
            before = torch.zeros(SHAPE) if initial is None else initial
            expected = AllGather().begin(comm, own, before, **options).wait()
            for got in (each.wait() for each in pending):
                # None where nothing enters, which the other schedule was given as zeros.
                found_and_expected = zip(got, expected, strict=True)
                worst = max(worst, *((b if a is None else a - b).abs().max().item() for a, b in found_and_expected))
        found[f"{kind}, schedule"] = worst
    return found


def main() -> None:
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:

        def memories(count: int, name: str) -> list[Tensor]:
            files = [f"{folder}/{name}{each}" for each in range(size)]
            mapped = [torch.from_file(file, shared=True, size=count, dtype=torch.uint8) for file in files]
            dist.barrier()
            return mapped

        def memory_of(rank: int, name: str, timeout_s: float) -> PeerMemory:
            return PeerMemory(rank, memories(bytes_needed(size, SLOT_BYTES), name), SLOT_BYTES, timeout_s)

        def work(rank: int) -> dict[str, object]:
            memory = memory_of(rank, "memory", 10.0)
            rounds = [(seed, reverse) for seed in range(ROUNDS) for reverse in (False, True)]
            found: dict[str, object] = {
                kind: max(error(memory, rank, size, kind, *each) for each in rounds)
                for kind in ("none", "scalar", "channel")
            }
            own, stored = torch.arange(37.0) + rank, torch.arange(3.0) - rank
            memory.push(stored, own)
            packed = [torch.cat((torch.arange(3.0) - each, torch.arange(37.0) + each)) for each in range(size)]
            found["collected"] = torch.equal(memory.collect(own, 3), torch.stack(packed))
            found["another call"] = of_another_call(memory, rank, own)
            found |= by_schedule(rank, size, memories)
            late = memory_of(rank, "late", 1e-4)
            if rank > 0:  # the first sends nothing
                late.push(None, own)
                try:
                    late.collect(own, 0)
                except Exception as failure:
                    found["late"] = str(failure)
            return found

        print(json.dumps(run(size, work)))


if __name__ == "__main__":
    main()
