"""Every schedule over one process a device, against one process: run by torchrun, over NCCL or gloo.

    torchrun --nproc-per-node 2 tests/distributed/over_devices.py cpu|cuda

The first rank prints, as JSON, the largest relative error of any rank and tensor, by backend, schedule and recurrence
(every kind of decay, the delta rule with each of its own), and what the comparison sees where nothing is exchanged.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "distributed"), str(TESTS / "ops"), str(TESTS)]

import test_delta_rule as delta  # noqa: E402
from problems import GATES, make, solve  # noqa: E402
from test_sequence_parallel import errors  # noqa: E402

import lasp  # noqa: E402
from lasp.exchange import EXCHANGES  # noqa: E402


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
    names = [*EXCHANGES, *(["peer"] if group == "nccl" else [])]
    tokens = 150
    lengths = (40, tokens - 40, *[0] * (size - 2))
    found = {}
    for gate in GATES:
        problem = make(gate, tokens=tokens, batch=1, value_heads=4, keys=16, values=16)
        expected = solve(problem, "reference")
        for backend, dtype in backends:
            for name in names:
                sp = lasp.SequenceParallel(dist.group.WORLD, exchange=name, lengths=lengths)
                found[f"{backend} {name} {gate}"] = errors(sp, problem, expected, backend, dtype=dtype, device=device)
    for gate in delta.GATES:
        dense = delta.make(gate, tokens=tokens, batch=1, keys=8, values=8)
        references = delta.solve(dense, "reference")
        for name in names:
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=name, lengths=lengths)
            values = delta.solve(dense, sp=sp, device=device)
            found[f"delta {name} {gate}"] = delta.errors(values, references, sp)
    # The control: a rank that computes its shard alone.
    part = slice(0, 40) if rank == 0 else slice(40, tokens if rank == 1 else 40)
    alone = {
        n: t if t is None or t.dim() < 3 or t.shape[1] != tokens else t[:, part] for n, t in problem.inputs.items()
    }
    o, _ = lasp.linear_attention(*(alone[name] for name in ("q", "k", "v", "g")), initial_state=alone["initial_state"])
    gap = (o - expected["o"][:, part]).norm() / expected["o"][:, part].norm()
    found["control: nothing exchanged"] = {"o": gap.item() if rank == 1 else 0.0}
    everywhere: list = [None] * size
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        print(json.dumps({name: max(max(each[name].values()) for each in everywhere) for name in found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
