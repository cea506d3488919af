"""Every schedule over one process a device, against one process: run by torchrun, over NCCL or gloo.

    torchrun --nproc-per-node 2 tests/distributed/over_devices.py cpu|cuda

The first rank prints, as JSON, the largest relative error of any rank and tensor: by backend, schedule and recurrence
(every kind of decay, the delta rule with each of its own), without and with packed documents; of softmax attention and
the short convolution; and what the comparison sees where nothing is exchanged.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "distributed"), str(TESTS / "ops"), str(TESTS)]

import test_delta_rule as delta  # noqa: E402
import test_halo as halo  # noqa: E402
import test_packed as packed  # noqa: E402
import test_softmax as softmax  # noqa: E402
from problems import GATES, make, solve  # noqa: E402
from test_sequence_parallel import errors  # noqa: E402
from tolerances import relative_error  # noqa: E402

import lasp  # noqa: E402
from lasp.exchange import EXCHANGES  # noqa: E402

Backends = list[tuple[str, torch.dtype]]
Found = dict[str, dict[str, float]]

# Of a state, in packed problems: what the kernels take.
packed.K = packed.V = 16
# On GPUs longer than the kernels' chunks.
BOUNDARIES = (0, 15, 15, 20, 45, 70, 75) if sys.argv[1:] == ["cpu"] else (0, 30, 30, 39, 90, 140, 150)
TOKENS = BOUNDARIES[-1]


def on(device: torch.device, tensors: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def recurrences(sps: dict[str, lasp.SequenceParallel], backends: Backends, device: torch.device) -> Found:
    found = {}
    for gate in GATES:
        problem = make(gate, tokens=TOKENS, batch=1, value_heads=4, keys=16, values=16)
        expected = solve(problem, "reference")
        for backend, dtype in backends:
            for name, sp in sps.items():
                found[f"{backend} {name} {gate}"] = errors(sp, problem, expected, backend, dtype=dtype, device=device)
    for gate in delta.GATES:
        dense = delta.make(gate, tokens=TOKENS, batch=1, keys=16, values=16)
        references = delta.solve(dense, "reference")
        for backend, dtype in backends:
            for name, sp in sps.items():
                values = delta.solve(dense, backend, dtype, sp=sp, device=device)
                found[f"{backend} {name} delta, {gate}"] = delta.errors(values, references, sp)
    return found


def packed_documents(sps: dict[str, lasp.SequenceParallel], backends: Backends, device: torch.device) -> Found:
    """Every kind of recurrence; one document is empty, two lie over a border of ranks."""
    found, count = {}, len(BOUNDARIES) - 1
    for kind in packed.KINDS:
        random = torch.Generator().manual_seed(1)
        inputs = packed.inputs_of(kind, TOKENS, count)
        d_o = torch.randn(inputs["v"].shape, generator=random, dtype=torch.float64)
        d_final = torch.randn(inputs["initial_state"].shape, generator=random, dtype=torch.float64)
        expected = on(device, packed.alone(inputs, d_o, d_final, BOUNDARIES))
        for backend, dtype in backends:
            given = on(device, {**inputs, "d_o": d_o, "d_final": d_final}, dtype)
            d_outputs = (given.pop("d_o"), given.pop("d_final"))
            for name, sp in sps.items():
                error = packed.shard_errors(sp, given, *d_outputs, BOUNDARIES, expected, backend)
                found[f"{backend} {name} {kind}, packed"] = {"worst": error}
    return found


def other_layers(sp: lasp.SequenceParallel, device: torch.device) -> Found:
    """Softmax attention and short convolution, whose exchanges are their own."""
    given = softmax.problem(TOKENS, 2 * sp.size, sp.size)
    expected = on(device, softmax.by_matrix(given, True))
    found = {
        f"torch softmax, {method}": softmax.errors(sp, on(device, given), expected, states=True, method=method)
        for method in ("all_gather", "ulysses")
    }
    convolved = halo.problem(TOKENS, 4, len(BOUNDARIES) - 1)
    expected = on(device, halo.by_document(convolved, BOUNDARIES, "silu"))
    return found | {"torch convolution": halo.errors(sp, on(device, convolved), expected, "silu", BOUNDARIES)}


def uneven(size: int) -> tuple[int, ...]:
    """Tokens of every rank; of more than two, the last has none."""
    first = TOKENS * 4 // 15
    if size == 2:
        return (first, TOKENS - first)
    each, rest = divmod(TOKENS - first, size - 2)
    return (first, each + rest, *[each] * (size - 3), 0)


def nothing_exchanged(rank: int, lengths: tuple[int, ...]) -> dict[str, float]:
    """The control: a rank that computes its shard alone."""
    problem = make("channel", tokens=TOKENS, batch=1, value_heads=4, keys=16, values=16)
    expected = solve(problem, "reference")["o"]
    start = sum(lengths[:rank])
    part = slice(start, start + lengths[rank])
    q, k, v, g = (problem.inputs[name][:, part] for name in ("q", "k", "v", "g"))
    o, _ = lasp.linear_attention(q, k, v, g, initial_state=problem.inputs["initial_state"])
    return {"o": relative_error(o, expected[:, part]) if rank == 1 else 0.0}


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    device, backends = torch.device("cpu"), [("torch", torch.float64)]
    if sys.argv[1] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backends.append(("triton", torch.float32))
    group = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(group, timeout=timedelta(seconds=60), device_id=device if group == "nccl" else None)
    lengths = uneven(size)
    # Over gloo every run has all schedules on three processes (test_sequence_parallel.py): here one of each sort.
    names = [*EXCHANGES, "peer"] if group == "nccl" else ["ring", "doubling"]
    sps = {name: lasp.SequenceParallel(dist.group.WORLD, exchange=name, lengths=lengths) for name in names}
    # What schedules carry does not tell of documents: one that folds in order, one that composes, one of its own.
    few = {name: sps[name] for name in ("ring", "doubling", "peer") if name in sps}
    found = recurrences(sps, backends, device) | packed_documents(few, backends, device)  # type: ignore[arg-type]
    found |= other_layers(sps["ring"], device)
    found["control: nothing exchanged"] = nothing_exchanged(rank, lengths)
    everywhere: list = [None] * size
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        print(json.dumps({name: max(max(each[name].values()) for each in everywhere) for name in found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
