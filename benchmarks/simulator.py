"""The simulator against measured training steps, on 1, 2, 4 and 8 gloo processes.

    python -m benchmarks.simulator            (about five minutes on two cores)

For every number of processes, in one group, it measures what the machine can do: a step of one process alone at
several lengths (wrapped in DDP with a group of one); how many cores' worth such steps get when all processes make one
at once, each for itself; the exchanges' constants; the sum of gradients. And whole steps of all processes, taking turns
with these, so that other work on the machine falls on all. The prediction uses none of the whole steps of several
processes; for one process it uses the steps of other lengths. Times are lower quartiles over repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import run

RESULTS = Path(__file__).parent / "results"
PROBED = (128, 256, 512, 1024, 2048, 4096, 8192)  # tokens of a step of one process alone
LENGTHS = (2048, 4096)  # tokens of the whole sequence
EXCHANGES = ("ring", "all_gather", "doubling")
PROBE = 1024
PHASES = ("forward", "backward", "optimizer")


def group_work(size: int, repetitions: int) -> Callable[[int], dict[str, Any]]:
    """Works in every process of a group of `size`; the first returns the figures."""

    def work(rank: int) -> dict[str, Any]:
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        from lasp.distributed.comm import Comm
        from lasp.distributed.mesh import build_mesh
        from lasp.exchange.measure import fit, operations
        from lasp.models import CausalLM, preset
        from lasp.parallelize import ParallelModel, parallelize

        config = preset("transnormer", "tiny")
        names = EXCHANGES if size > 1 else ("none",)
        # What DDP does on a process counts as its own work: here with a group of one.
        own_group = [dist.new_group([each]) for each in range(size)][rank]
        single_model = CausalLM(config)
        wrapped = DistributedDataParallel(single_model, process_group=own_group, gradient_as_bucket_view=True)
        alone = ParallelModel(single_model, wrapped if size > 1 else single_model, None)
        models = {}
        for name in names:
            torch.manual_seed(0)
            mesh = build_mesh(sp=size) if size > 1 else None
            models[name] = parallelize(CausalLM(config), mesh, exchange="auto" if name == "none" else name)
        optimizers = {id(m): torch.optim.AdamW(m.module.parameters()) for m in (alone, *models.values())}

        def step(model: Any, here: int, total: int) -> list[float]:
            """Seconds of forward, backward and optimizer."""
            text = torch.randint(config.vocab_size, (1, here + 1))
            marks = [time.perf_counter()]
            out = model.training(text[:, :-1], labels=text[:, 1:], sp=model.sp)
            marks.append(time.perf_counter())
            model.mean_loss(out.loss_sum, total).backward()
            marks.append(time.perf_counter())
            optimizers[id(model)].step()
            optimizers[id(model)].zero_grad()
            marks.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(marks)]

        def probe() -> float:
            start = time.perf_counter()
            step(alone, PROBE, PROBE)
            return time.perf_counter() - start

        def meet() -> None:
            dist.barrier()

        single: dict[int, list[list[float]]] = {n: [] for n in PROBED}
        whole: dict[tuple[str, int], list[float]] = {(name, total): [] for name in names for total in LENGTHS}
        probes: dict[str, list[float]] = {"alone": [], "together": []}
        load = []
        for repetition in range(-1, repetitions):
            load.append(os.getloadavg()[0])
            for total in LENGTHS:
                for name, model in models.items():
                    meet()
                    start = time.perf_counter()
                    step(model, total // size, total)
                    meet()
                    if repetition >= 0:
                        whole[name, total].append(time.perf_counter() - start)
            for n in PROBED:
                if rank == 0:
                    single[n].append(step(alone, n, n)) if repetition >= 0 else step(alone, n, n)
                meet()
            for _ in range(2):
                if rank == 0:
                    probes["alone"].append(probe())
                meet()
                probes["together"].append(probe())
                meet()
        figures: dict[str, Any] = {"single": single, "whole": whole, "probes": probes, "load": load}
        if size > 1:
            assert dist.group.WORLD is not None
            comm = Comm(dist.group.WORLD, 300.0)
            figures["constants"] = operations(comm, torch.device("cpu"), repetitions=10).constants()
            sizes, times = (64 << 10, 1 << 20, 8 << 20), []
            for nbytes in sizes:
                tensor, own = torch.zeros(nbytes // 4), []
                for _ in range(8):
                    meet()
                    start = time.perf_counter()
                    dist.all_reduce(tensor)
                    own.append(time.perf_counter() - start)
                times.append(low(own))
            figures["reduce"] = fit(sizes, times)
        return figures

    return work


def low(values: list[float]) -> float:
    """Lower quartile: whatever else a machine does only adds time."""
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def interpolated(points: dict[int, float], at: int) -> float:
    """Between its neighbours, linearly; `at` itself does not count."""
    below = max(n for n in points if n < at)
    above = min(n for n in points if n > at)
    return points[below] + (points[above] - points[below]) * (at - below) / (above - below)


def predicted(size: int, name: str, total: int, figures: dict[str, Any], cores: float) -> float:
    """Seconds of a step, from figures of one process and of the network."""
    from lasp.analysis import model as numbers
    from lasp.analysis.simulator import SimulatedMachine, simulate
    from lasp.analysis.step import Pieces, Step, program
    from lasp.exchange import EXCHANGES as SCHEDULES
    from lasp.exchange.cost import GLOO, Link
    from lasp.models import preset

    config = preset("transnormer", "tiny")
    here = total // size
    phases = [
        interpolated({n: low([row[index] for row in rows]) for n, rows in figures["single"].items()}, here)
        for index in range(len(PHASES))
    ]
    # By FLOP: what of a forward and of a backward pass is the head, and what of a layer is its attention.
    layers = numbers.layers(config)
    matrices = sum(each.mixer_matrices + each.ffn_matrices for each in layers)
    head = config.vocab_size * config.d_model
    outside = head / (head + matrices)
    mixer = layers[-1].mixer_matrices / (layers[-1].mixer_matrices + layers[-1].ffn_matrices)

    def pieces(seconds: float) -> Pieces:
        one = seconds * (1 - outside) / config.num_layers
        return Pieces(one * mixer * 0.75, one * mixer * 0.1, one * (1 - mixer) + one * mixer * 0.15)

    constants = figures.get("constants", GLOO)
    reduce_link: Link = figures.get("reduce", Link(0.0, 1e12))
    step = Step(
        layers=config.num_layers,
        forward=pieces(phases[0]),
        backward=pieces(phases[1]),
        outside_forward=phases[0] * outside,
        outside_backward=phases[1] * outside,
        optimizer=phases[2],
        load=layers[-1].load(1),
        exchange=SCHEDULES["ring" if name == "none" else name](),
        name="ring" if name == "none" else name,
        constants=constants,
        nodes=(size,),
        reduce_s=reduce_link.seconds,
        gradient_bytes=(4.0 * layers[-1].parameters, 4.0 * numbers.embedding_parameters(config)),
    )
    machine = SimulatedMachine((size,), constants.message, constants.across, cores=cores)
    return max(simulate(machine, program(step)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    import torch

    rows, machines = [], []
    for size in arguments.sizes:
        ranks = run(size, group_work(size, arguments.repetitions))
        figures = ranks[0]
        together = low([max(times) for times in zip(*(each["probes"]["together"] for each in ranks), strict=True)])
        cores = min(float(os.cpu_count() or 1), size * low(figures["probes"]["alone"]) / together)
        machines.append({"ranks": size, "cores": cores, "load_average": figures["load"]})
        print(f"{size} processes: {cores:.2f} cores' worth, load average {statistics.median(figures['load']):.1f}")
        for (name, total), seconds in figures["whole"].items():
            guess, found = predicted(size, name, total, figures, cores), low(seconds)
            rows.append(
                {
                    "ranks": size,
                    "exchange": name,
                    "tokens": total,
                    "predicted_s": guess,
                    "measured_s": found,
                    "quartiles_s": statistics.quantiles(seconds, n=4),
                    "error": guess / found - 1,
                }
            )
            print(
                f"  {name:<12}{total:>6} tokens: measured {found * 1e3:7.1f} ms, predicted {guess * 1e3:7.1f} ms, "
                f"{guess / found - 1:+.0%}",
                flush=True,
            )
    errors = [abs(row["error"]) for row in rows]
    several = [abs(row["error"]) for row in rows if row["ranks"] > 1]
    record = {
        "what": "training steps of transnormer-tiny, fp32, batch 1: simulated and measured",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repetitions": arguments.repetitions,
        "groups": machines,
        "rows": rows,
        "median_error": statistics.median(errors),
        "median_error_of_several_processes": statistics.median(several) if several else None,
        "largest_error": max(errors),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['date']}-cpu-simulator.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"median error {record['median_error']:.1%}, largest {record['largest_error']:.1%}; written to {path}")


if __name__ == "__main__":
    main()
