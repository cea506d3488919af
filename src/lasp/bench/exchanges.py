"""Times every exchange of the state on these processes, beside the cost model's prediction."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lasp.distributed import process_group
from lasp.distributed.comm import Comm
from lasp.errors import ConfigError
from lasp.exchange import EXCHANGES, Auto, Payload, Pipelined
from lasp.exchange.cost import Model
from lasp.exchange.measure import exchange_work, operations, timings
from lasp.exchange.peer.exchange import Peer, is_possible
from lasp.train.preflight import check_gpus, check_target

# Heads, K, V and numbers of transition a head: 16 KiB to 4 MiB of scalar-decay state, and a delta rule.
LOADS = ((4, 32, 32, 1), (16, 64, 64, 1), (16, 128, 128, 1), (64, 128, 128, 1), (16, 64, 64, 64 * 64))


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure the constants of the cost model on a group of processes, then time every schedule and compare.

    Alone it starts its own processes on this machine; under torchrun it measures those that are there.
    """

    nproc: int = 2
    """Processes to start, where no launcher has."""
    repetitions: int = 20
    """Times that each schedule is measured, taking turns; twice as often for the constants."""
    save: Path | None = None
    """File for the constants, for lasp.exchange.Auto(Constants.load(path))."""
    output: Path | None = None
    """JSON file for all figures."""
    device: Literal["cpu", "cuda"] = "cpu"

    def validate(self, *, writes: bool = True) -> None:
        """Raises ConfigError if a value means nothing. writes: this process is the one that writes the files."""
        if self.nproc < 2:
            raise ConfigError(f"--nproc must be at least 2 for something to be exchanged, got {self.nproc}")
        if self.repetitions < 1:
            raise ConfigError(f"--repetitions must be at least 1, got {self.repetitions}")
        check_gpus(self.device, self.nproc)
        if writes:
            check_target("--save", self.save)
            check_target("--output", self.output)


def run(config: BenchConfig) -> dict[str, Any]:
    """All figures, measured in this process, one of those that a launcher started; the same on all."""
    device = torch.device(config.device)
    if config.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    process_group.start(device, timeout_s=300)
    try:
        return _measure(config, device)
    finally:
        dist.destroy_process_group()


def _measure(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    comm = Comm(dist.group.WORLD, 300.0)
    constants = operations(comm, device, repetitions=2 * config.repetitions).constants()
    if config.save is not None and comm.rank == 0:
        constants.save(config.save)
    auto, rows = Auto(constants), []
    for load in (Payload(*sizes) for sizes in LOADS):
        model = Model(load, comm.nodes, constants)
        schedules = [make() for make in EXCHANGES.values() if make is not Pipelined] + [Pipelined(constants=constants)]
        peers = is_possible(comm, load.summary_bytes, device)
        schedules += [Peer()] if peers else []
        times = timings(
            comm, [exchange_work(comm, schedule, load, device) for schedule in schedules], device, config.repetitions
        )
        chosen = auto.choose(load, comm.nodes, peers=peers)
        for schedule, timing in zip(schedules, times, strict=True):
            seconds = [value / 2 for value in timing]
            rows.append(
                {
                    **asdict(load),
                    "state_bytes": load.state_bytes,
                    "schedule": schedule.name.split(" by constants")[0],
                    "predicted_s": schedule.seconds(model, want_total=False),
                    "measured_s": seconds[0],
                    "quartiles_s": seconds[1:],
                    "chosen": schedule.name == chosen.name,
                }
            )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return {
        "ranks": comm.size,
        "nodes": list(comm.nodes),
        "backend": comm.backend,
        "device": where,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "repetitions": config.repetitions,
        "constants": asdict(constants),
        "rows": rows,
    }


def table(figures: dict[str, Any]) -> str:
    """A line per schedule and size of state."""
    lines = [
        f"{figures['ranks']} ranks over {figures['backend']}, {figures['device']}, torch {figures['torch']}; "
        f"one exchange, median and quartiles of {figures['repetitions']}, microseconds",
        f"{'state':>9} {'transition':>10}  {'schedule':<32}{'predicted':>10}{'measured':>10}   {'quartiles':<16}",
    ]
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        groups.setdefault((row["state_bytes"], row["transition"]), []).append(row)
    for (state, transition), rows in groups.items():
        best = min(row["measured_s"] for row in rows)
        for row in sorted(rows, key=lambda row: row["measured_s"]):
            low, high = (f"{value * 1e6:.0f}" for value in row["quartiles_s"])
            mark = f"  chosen, {row['measured_s'] / best:.2f} of the best" if row["chosen"] else ""
            lines.append(
                f"{state >> 10:>5} KiB {transition:>10}  {row['schedule']:<32}{row['predicted_s'] * 1e6:>10.0f}"
                f"{row['measured_s'] * 1e6:>10.0f}   {low + ' - ' + high:<16}{mark}"
            )
    return "\n".join(lines)
