"""`lasp bench exchange`: what every way of carrying the state takes on these processes, and what the model says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lasp import files
from lasp.cli.checks import check_gpus, check_target
from lasp.cli.options import parse
from lasp.terminal import say
from lasp.train.errors import ConfigError

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

    def validate(self) -> None:
        """Raises ConfigError if a value means nothing."""
        if self.nproc < 2:
            raise ConfigError(f"--nproc must be at least 2 for something to be exchanged, got {self.nproc}")
        if self.repetitions < 1:
            raise ConfigError(f"--repetitions must be at least 1, got {self.repetitions}")
        check_gpus(self.device, self.nproc)
        if os.environ.get("RANK", "0") == "0":
            check_target("--save", self.save)
            check_target("--output", self.output)


def main(arguments: Sequence[str]) -> int:
    """Run `lasp bench ARGUMENTS`."""
    if arguments and arguments[0] == "train":
        from lasp.cli.bench_train import main as bench_train

        return bench_train(arguments[1:])
    if not arguments or arguments[0] != "exchange":
        if arguments and arguments[0] in ("-h", "--help"):
            say("usage: lasp bench exchange|train [OPTIONS]      (lasp bench exchange --help lists them)")
            return 0
        raise ConfigError("lasp bench can measure two things: lasp bench exchange, and lasp bench train")
    config = parse(BenchConfig, arguments[1:], "lasp bench exchange")
    config.validate()
    if "RANK" not in os.environ:
        from lasp.cli.launch import launch

        return launch(["bench", *arguments], config.nproc)
    return run(config)


def run(config: BenchConfig) -> int:
    """Measure in this process, one of those that RANK and WORLD_SIZE number; print and write on the first."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device(config.device)
    if config.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if config.device == "cuda" else "gloo",
        init_method=os.environ.get("LASP_RENDEZVOUS", "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=300),
    )
    try:
        figures = _measure(config, device)
        if dist.get_rank() == 0:
            say(_table(figures))
            if config.output is not None:
                files.write_output(config.output, json.dumps(figures, indent=1) + "\n")
    finally:
        dist.destroy_process_group()
    return 0


def _measure(config: BenchConfig, device: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from lasp.distributed.comm import Comm
    from lasp.exchange import EXCHANGES, Auto, Payload, Pipelined
    from lasp.exchange.cost import Model
    from lasp.exchange.measure import exchange_work, operations, timings
    from lasp.exchange.peer.exchange import Peer, is_possible

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


def _table(figures: dict[str, Any]) -> str:
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
