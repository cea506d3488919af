"""Processes that write into each other's memory, in Triton's interpreter: what every exchange brings, on every rank.

    python tests/kernels/triton/peer_memory.py RANKS

Prints, as JSON, each rank's largest error against summaries applied one after the other, by kind of transition, and
how a wait for a rank that sends nothing ends. The memories are files that all processes map.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder
from world import run

from lasp.algebra import Diagonal, Identity, Scalar, Summary
from lasp.kernels.triton.peer.memory import PeerMemory, bytes_needed

# The interpreter runs assertions on the device only then.
interpreter_builder.options = replace(interpreter_builder.options, debug=True, sanitize_overflow=False)
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


def main() -> None:
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:

        def memory_of(rank: int, name: str, timeout_s: float) -> PeerMemory:
            count = bytes_needed(size, SLOT_BYTES)
            files = [f"{folder}/{name}{each}" for each in range(size)]
            memories = [torch.from_file(file, shared=True, size=count, dtype=torch.uint8) for file in files]
            dist.barrier()
            return PeerMemory(rank, memories, SLOT_BYTES, timeout_s)

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
