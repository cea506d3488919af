"""Measures what it costs that every message belongs to a call: beside the calls themselves, and beside a layer.

    python -m benchmarks.message_checks                              # two processes on CPUs
    python -m benchmarks.message_checks --output benchmarks/results  # also, where there is a GPU, two that share it

Two tables. Over gloo all ranks tell each other of a call before its messages: microseconds of a forward and a backward
pass of a short recurrence, told and untold in turns, with the same documents in every call and with others. Over NCCL
messages carry a header: on one GPU, without another rank, what a call and a message of a state add in kernels, bytes,
and microseconds of the host and of the GPU; and what share that is of a layer of 8K tokens, forward and backward, by
an all-gather each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import lasp
from benchmarks.outputs import folder
from benchmarks.parallel_kinds import Shape, kind_named
from benchmarks.processes import run
from benchmarks.sequence_parallel import step
from lasp.distributed.call import Call, Calls
from lasp.distributed.record import RECORD_BYTES, Description, Record
from lasp.distributed.sealed import HEADER_BYTES, SealedCalls, TorchStamps

ROUNDS, WARM_UP = 300, 30
LAYER = Shape(16, 128, (8192,))


class _Untold(Calls):
    """Calls of which nobody is told, for comparison."""

    def begin(self, description: Description, documents: str | None = None, **others: Any) -> Call:
        return Call(self, Record(0, description, documents), None)


def quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"low": low * 1e6, "median": median * 1e6, "high": high * 1e6}


def told(rank: int, device: str, rounds: int) -> dict[str, Any]:
    """Microseconds of a forward and a backward pass over two ranks, by whether documents are new and ranks are told."""
    sp = lasp.SequenceParallel(dist.group.WORLD, exchange="all_gather")
    random = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, 64, 2, 16, generator=random).to(device).requires_grad_() for _ in range(3))
    g = -torch.rand(1, 64, 2, generator=random).to(device)
    number = 0

    def documents(kind: str) -> list[int] | None:
        nonlocal number
        number += 1
        first, second = divmod(number, 63)
        new = [0, 1 + first % 63, 65 + second, 128]
        return {"none": None, "the same": [0, 5, 70, 128], "new": new}[kind]

    def call(kind: str) -> None:
        o, _ = lasp.linear_attention(q, k, v, g, cu_seqlens=documents(kind), sp=sp, backend="torch")
        o.sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {}
    for turn in range(-WARM_UP, rounds):
        for kind in ("none", "the same", "new"):
            for name, calls in (("told", Calls(sp.comm)), ("untold", _Untold(sp.comm))):
                dist.barrier()
                sp.calls = calls
                start = time.perf_counter()
                call(kind)
                if turn >= 0:
                    times.setdefault(f"documents {kind}, {name}", []).append(time.perf_counter() - start)
    sp.calls = Calls(sp.comm)
    record = Description("nothing", {})
    for turn in range(-WARM_UP, rounds):
        start = time.perf_counter()
        sp.calls.begin(record).check()
        if turn >= 0:
            times.setdefault("a record alone", []).append(time.perf_counter() - start)
    return {name: quartiles(each) for name, each in times.items()}


class _Alone:
    """Stands for the communicator of a rank that has no other: what a header takes needs none."""

    def __init__(self, step_number: int = 0) -> None:
        from lasp.distributed.record import RecordedStep

        self.step, self.rank = RecordedStep(step_number), 0

    def compare(self, description: Description) -> None:
        """Nobody to compare with."""


def host_us(work: Callable[[], object], rounds: int) -> float:
    """Host time of one call, queued one after another and not waited for."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            work()
        times.append((time.perf_counter() - start) / rounds)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def gpu_work(work: Callable[[], object]) -> tuple[float, float]:
    """(kernels and copies, microseconds of them) of one on the GPU."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            work()
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) / 10, sum(event.device_time for event in events) / 10


def headers(rounds: int) -> dict[str, Any]:
    """Times of calls and messages of a state of LAYER's size, by kernels and by PyTorch, and a layer's time."""
    from lasp.kernels.triton.messages.stamps import TritonStamps

    device = torch.device("cuda", 0)
    state = torch.randn(LAYER.heads, LAYER.head_dim, LAYER.head_dim, device=device)
    found: dict[str, Any] = {"header_bytes": HEADER_BYTES, "payload_bytes": state.nbytes}
    description, comm = Description("linear_attention", {}), _Alone()
    for name, stamps in (("Triton", TritonStamps()), ("PyTorch", TorchStamps())):
        calls = SealedCalls(comm, device, stamps)  # type: ignore[arg-type]

        def begin(calls: SealedCalls = calls) -> Any:
            return calls.begin(description)

        call = begin()
        message = call._sealed(state)
        two = torch.stack((message, message))
        works: dict[str, Callable[[], object]] = {
            "a call": begin,
            "sealing a message": partial(call._sealed, state),
            "opening two": partial(call._opened, two, state.numel()),
        }
        for what, work in works.items():
            kernels, microseconds = gpu_work(work)
            found[f"{name}, {what}"] = {"kernels": kernels, "gpu_us": microseconds, "host_us": host_us(work, rounds)}
    kind = kind_named("layer", LAYER, device)
    method, sample = kind.over(None), kind.sample(LAYER.tokens[0], device)
    for _ in range(5):
        step(method, sample, kind.parameters)
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(method, sample, kind.parameters)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    found["layer, 8192 tokens, forward and backward"] = quartiles(times)
    layer_us = statistics.median(times) * 1e6
    for name in ("Triton", "PyTorch"):
        both = [found[f"{name}, {what}"] for what in works]
        for clock in ("host_us", "gpu_us"):  # a pass each way: a call, a message sealed, those of two ranks opened
            found[f"{name}, share of a layer, {clock}"] = 2 * sum(each[clock] for each in both) / layer_us
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=folder, help="folder for the raw figures, as JSON")
    options = parser.parse_args()
    # Without asking a GPU here: processes are forked.
    on_gpu = torch.cuda.device_count() > 0
    found: dict[str, Any] = {"torch": torch.__version__, "record_bytes": RECORD_BYTES}
    for device in ("cpu", *(["cuda:0"] if on_gpu else [])):
        found[f"gloo, two processes, {device}"] = run(2, partial(told, device=device, rounds=options.rounds))[0]
    if on_gpu:
        found["device"] = torch.cuda.get_device_name(0)
        found["headers"] = headers(options.rounds)
    for name, rows in found.items():
        if not isinstance(rows, dict):
            print(f"{name}: {rows}")
            continue
        print(f"\n{name}")
        for what, value in rows.items():
            shown = value
            if isinstance(value, dict):
                shown = "  ".join(f"{key} {number:9.1f}" for key, number in value.items())
            print(f"  {what:<50} {shown}")
    if options.output is not None:
        device = found.get("device", "cpu").lower().replace(" ", "-")
        (options.output / f"{device}-message-checks.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
