"""Is what `lasp plan` recommends for two CPU processes the measured best of what it lists?

    python -m benchmarks.plan_check            (about two minutes on two cores)

Lists the layouts that the library's training runs (DDP; dp = 2, or sp = 2 with every schedule), measures a training
step of each, taking turns, and compares the recommended one with the fastest measured. Lower quartiles. With one
sequence per step only the schedules differ, by microseconds of a step: then all are within the noise.
"""

from __future__ import annotations

import argparse
import datetime
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
SCHEDULES = ("ring", "all_gather", "doubling", "all_to_all", "pipelined")
JOBS = ((2, 1024), (2, 4096), (1, 2048))  # sequences of a step, tokens of each


def listed(batch: int, seq_len: int) -> list[dict[str, Any]]:
    """Layouts with their predicted seconds, the recommended first."""
    from lasp.analysis.devices import CPU
    from lasp.analysis.planner import Job, Layout, estimate, problem
    from lasp.models import preset

    job = Job(config=preset("transnormer", "tiny"), device=CPU, devices=2, seq_len=seq_len, batch=batch)
    layouts = [Layout("lasp", 1, 2, "ddp", "none", name) for name in SCHEDULES]
    layouts += [Layout("data", 2, 1, "ddp", "none", "-")] if problem(job, "data", 1) is None else []
    found = [
        {"dp": each.dp, "sp": each.sp, "schedule": each.schedule, "predicted_s": estimate(job, each).step_s}
        for each in layouts
    ]
    return sorted(found, key=lambda each: each["predicted_s"])


def measuring(batch: int, seq_len: int, layouts: list[dict[str, Any]], repetitions: int) -> Callable[[int], Any]:
    """What each of two processes does; the seconds of every layout, by repetition."""

    def work(rank: int) -> list[list[float]]:
        import torch
        import torch.distributed as dist

        from lasp.distributed.mesh import build_mesh
        from lasp.models import CausalLM, preset
        from lasp.parallelize import parallelize

        config = preset("transnormer", "tiny")
        models = []
        for each in layouts:
            torch.manual_seed(0)
            exchange = each["schedule"] if each["sp"] > 1 else "auto"
            model = parallelize(CausalLM(config), build_mesh(sp=each["sp"]), exchange=exchange)
            models.append((model, torch.optim.AdamW(model.module.parameters()), each))
        seconds: list[list[float]] = [[] for _ in models]
        for repetition in range(-1, repetitions):
            for index, (model, optimizer, each) in enumerate(models):
                text = torch.randint(config.vocab_size, (batch // each["dp"], seq_len // each["sp"] + 1))
                dist.barrier()
                start = time.perf_counter()
                out = model.training(text[:, :-1], labels=text[:, 1:], sp=model.sp)
                model.mean_loss(out.loss_sum, batch * seq_len).backward()
                optimizer.step()
                optimizer.zero_grad()
                dist.barrier()
                if repetition >= 0:
                    seconds[index].append(time.perf_counter() - start)
        return seconds

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    jobs = []
    for batch, seq_len in JOBS:
        layouts = listed(batch, seq_len)
        seconds = run(2, measuring(batch, seq_len, layouts, arguments.repetitions))[0]
        for each, own in zip(layouts, seconds, strict=True):
            each["quartiles_s"] = statistics.quantiles(own, n=4)
            each["measured_s"] = each["quartiles_s"][0]
        best = min(layouts, key=lambda each: each["measured_s"])
        ratio = layouts[0]["measured_s"] / best["measured_s"]
        print(f"{batch} x {seq_len} tokens: recommended is {ratio:.3f} of the best, load {os.getloadavg()[0]:.1f}")
        for each in layouts:
            print(
                f"  dp={each['dp']} sp={each['sp']} {each['schedule']:<11} "
                f"predicted {each['predicted_s'] * 1e3:7.1f} ms, "
                f"measured {each['measured_s'] * 1e3:7.1f} ms{'  best' if each is best else ''}",
                flush=True,
            )
        jobs.append(
            {
                "batch": batch,
                "seq_len": seq_len,
                "layouts": layouts,
                "recommended_to_best": ratio,
                "load_average": os.getloadavg()[0],
            }
        )
    record = {
        "what": "training steps of transnormer-tiny, fp32, on two gloo processes: layouts listed and measured",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "jobs": jobs,
    }
    path = RESULTS / f"{record['date']}-cpu-plan.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
