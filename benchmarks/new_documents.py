"""Measures what a step of a model of transformers costs where every batch has documents of its own.

    python -m benchmarks.new_documents                               # two processes over gloo on CPUs
    python -m benchmarks.new_documents --output benchmarks/results

Two processes split packed rows of a small Qwen3-Next: the same documents in every step, and others in every step, in
turns, forward and backward; also the part of `lasp.hf.shard`, which finds them. Beside the milliseconds stand the
messages of a step and the bytes of what the ranks tell each other of their calls, which are no estimate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

import lasp
from benchmarks.outputs import folder
from benchmarks.processes import run

LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
TOKENS, DOCUMENTS = 2048, 8


def batch(number: int) -> dict[str, torch.Tensor]:
    """A packed row, whose documents are as long as `number` says."""
    random = torch.Generator().manual_seed(number)
    cuts = (torch.randperm(TOKENS - 1, generator=random)[: DOCUMENTS - 1] + 1).sort().values.tolist()
    bounds = [0, *cuts, TOKENS]
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    ids = torch.randint(256, (1, TOKENS), generator=random)
    return {"input_ids": ids, "labels": ids, "position_ids": positions[None]}


def work(steps: int) -> dict[str, Any]:
    """Medians of a rank."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            vocab_size=256, hidden_size=128, num_hidden_layers=4, layer_types=LAYERS, intermediate_size=256,
            num_experts=0, num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32, use_cache=False,
        )
    )  # fmt: skip
    sp = lasp.SequenceParallel(dist.group.WORLD)
    lasp.hf.parallelize(model.train(), sp)
    kinds = {"same": lambda step: batch(0), "new": lambda step: batch(1 + step)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sharding, counts = [], {}
    for step in range(steps + 2):
        for kind, made in kinds.items():
            whole = made(step)
            sp.counters.reset()
            dist.barrier()
            start = time.perf_counter()
            part = lasp.hf.shard(whole, sp)
            middle = time.perf_counter()
            model(**part).loss.backward()
            end = time.perf_counter()
            if step >= 2:  # what is set up once
                sharding.append(middle - start)
                seconds[kind].append(end - start)
            found = sp.counters
            counts[kind] = {"messages": found.messages, "sent_bytes": found.sent_bytes, "told": found.header_bytes}
    differences = [new - same for same, new in zip(seconds["same"], seconds["new"], strict=True)]
    return {
        "ms": {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()},
        "difference_ms": 1e3 * statistics.median(differences),
        "quartiles_ms": [1e3 * q for q in statistics.quantiles(differences, n=4)],
        "shard_ms": 1e3 * statistics.median(sharding),
        "counts": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=folder)
    args = parser.parse_args()
    record = {
        "date": datetime.date.today().isoformat(), "device": "cpu", "ranks": 2, "torch": torch.__version__,
        "transformers": version("transformers"), "tokens": TOKENS, "documents": DOCUMENTS, "steps": args.steps,
        "by_rank": run(2, lambda rank: work(args.steps)),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if args.output:
        (args.output / f"{record['date']}-cpu-new-documents.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
