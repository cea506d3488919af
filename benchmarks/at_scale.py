"""Schedules on many GPUs by the simulator: a 1B GLA model, 32K tokens a GPU, H100s, one sequence over all of them.

    python -m benchmarks.at_scale            (about a minute; writes a JSON file and prints a Markdown table)

A step is simulated message by message (lasp.analysis.step), its kernels by roofline and its links by the defaults for
NCCL. "one straggler" makes one rank in the middle 5 % slower. The last row is a sequence of 2^30 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

from lasp.analysis import volume
from lasp.analysis.devices import H100
from lasp.analysis.model import embedding_parameters, layer, num_parameters
from lasp.analysis.planner import nodes_of
from lasp.analysis.simulator import SimulatedMachine, simulate
from lasp.analysis.step import Pieces, Step, program
from lasp.analysis.timing import collective, compute
from lasp.exchange import EXCHANGES
from lasp.models import preset

RESULTS = Path(__file__).parent / "results"
SCHEDULES = ("ring", "all_gather", "pipelined", "doubling", "hierarchical")
# GPUs and tokens a GPU.
CASES = ((8, 1 << 15), (64, 1 << 15), (256, 1 << 15), (1024, 1 << 15), (4096, 1 << 18))
SLOWER = 1.05


def step_of(name: str, ranks: int, tokens: int) -> Step:
    """One rank's step: attention's local backward part runs while the exchange is under way."""
    config = preset("gla", "1b", num_heads=16, key_dim=128, value_dim=128)
    own = compute(
        config, H100, batch=1, tokens=tokens, context=ranks * tokens, recomputation="none",
        optimizer_parameters=num_parameters(config) / ranks,
    )  # fmt: skip
    count, gradients = config.num_layers, 4.0 * num_parameters(config)
    moved = volume.zero3(num_parameters(config), ranks, parameter_itemsize=2).received_bytes / gradients
    backward = own.backward / count - own.hidden_backward
    return Step(
        layers=count,
        forward=Pieces(own.forward / count / 2, 0.0, own.forward / count / 2),
        backward=Pieces(backward / 2, own.hidden_backward, backward / 2),
        outside_forward=0.0,
        outside_backward=0.0,
        optimizer=own.optimizer,
        load=layer(config, 0).load(1),
        exchange=EXCHANGES[name](),
        name=name,
        constants=H100.constants,
        nodes=nodes_of(H100, ranks),
        # All that FSDP moves for a bucket, gathers too, counted when its gradients are ready.
        reduce_s=lambda nbytes: collective(H100, nbytes * moved, ranks),
        gradient_bytes=(4.0 * layer(config, 0).parameters, 4.0 * embedding_parameters(config)),
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[dict[str, Any]] = []
    print("| GPUs | tokens | " + " | ".join(SCHEDULES) + " | one straggler (hierarchical) |")
    print("|---" * (len(SCHEDULES) + 3) + "|")
    for ranks, tokens in CASES:
        cells = []
        slow = tuple(SLOWER if rank == ranks // 2 else 1.0 for rank in range(ranks))
        for name, slowness in [*((name, ()) for name in SCHEDULES), ("hierarchical", slow)]:
            step = step_of(name, ranks, tokens)
            machine = SimulatedMachine(step.nodes, H100.constants.message, H100.constants.across, slowness=slowness)
            start = time.perf_counter()
            seconds = max(simulate(machine, program(step)))
            rows.append(
                {
                    "ranks": ranks,
                    "tokens": ranks * tokens,
                    "schedule": name,
                    "straggler": bool(slowness),
                    "step_s": seconds,
                    "tokens_per_s_per_gpu": tokens / seconds,
                    "simulated_in_s": time.perf_counter() - start,
                }
            )
            cells.append(f"{tokens / seconds:,.0f}")
        length = f"{ranks * tokens >> 10}K" if ranks * tokens < 1 << 20 else f"{ranks * tokens >> 20}M"
        print(f"| {ranks} | {length} | {' | '.join(cells)} |", flush=True)
    record = {
        "what": "simulated training steps of a 1B GLA model on H100s, tokens/s per GPU",
        "date": datetime.date.today().isoformat(),
        "constants": H100.constants.source,
        "rows": rows,
    }
    path = RESULTS / f"{record['date']}-simulated-at-scale.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
