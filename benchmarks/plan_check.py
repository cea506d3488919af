"""Checks that what `lasp plan` recommends for two CPU processes is the measured best of what it lists.

    python -m benchmarks.plan_check                       (about three minutes on two cores, nothing else running)
    python -m benchmarks.plan_check --table RESULT.json   (the documentation's table of a kept result)

Takes what `lasp plan` lists of what `lasp train` runs (dp = 2, or sp = 2 with every schedule), measures a training step
of each, taking turns, and compares the recommended one with the fastest measured, by medians. What the plan calls as
good as the recommended one must be so: the recommended one may be slower than the best by the plan's own tolerance, and
the best must be it or one of those. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import run

RESULTS = Path(__file__).parent / "results"
JOBS = ((2, 1024), (2, 4096), (1, 2048))  # sequences of a step, tokens of each


def listed(batch: int, seq_len: int) -> tuple[list[dict[str, Any]], float]:
    """Layouts with their predicted seconds, the recommended first, and the plan's tolerance."""
    from lasp.analysis.devices import CPU
    from lasp.analysis.planner import Job
    from lasp.analysis.report import alternatives, plan, trains
    from lasp.models import preset

    job = Job(config=preset("transnormer", "tiny"), device=CPU, devices=2, seq_len=seq_len, batch=batch)
    found = plan(job)
    ties = found["ties_for_lasp_train"]
    layouts = [
        {
            **{name: each[name] for name in ("dp", "sp", "schedule")},
            "predicted_s": each["step_s"],
            "as_good": each in (found["recommended_for_lasp_train"], *ties),
        }
        for each in alternatives(job)
        if trains(each)
    ]
    return layouts, found["tie"]


def measuring(batch: int, seq_len: int, layouts: list[dict[str, Any]], repetitions: int) -> Callable[[int], Any]:
    """Measures in each of two processes; returns the seconds of every layout, by repetition."""

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


def table(record: dict[str, Any]) -> str:
    """Markdown: the recommended layout and the measured best of every step."""
    lines = [
        "| step | recommended | measured ms | best measured | ms | recommended / best |",
        "|---|---|---|---|---|---|",
    ]
    for job in record["jobs"]:
        best = min(job["layouts"], key=lambda each: each["measured_s"])
        cells = [f"{job['batch']} x {job['seq_len']} tokens"]
        for each in (job["layouts"][0], best):
            name = f"dp={each['dp']}" if each["sp"] == 1 else f"sp={each['sp']}, `{each['schedule']}`"
            cells += [name, f"{1e3 * each['measured_s']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {job['recommended_to_best']:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--table", type=Path, help="print the table of this result, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    jobs, good = [], True
    for batch, seq_len in JOBS:
        layouts, tolerance = listed(batch, seq_len)
        seconds = run(2, measuring(batch, seq_len, layouts, arguments.repetitions))[0]
        for each, own in zip(layouts, seconds, strict=True):
            each["quartiles_s"] = statistics.quantiles(own, n=4)
            each["measured_s"] = statistics.median(own)
        best = min(layouts, key=lambda each: each["measured_s"])
        ratio = layouts[0]["measured_s"] / best["measured_s"]
        right = ratio <= 1 + tolerance and best["as_good"]
        good &= right
        print(
            f"{batch} x {seq_len} tokens: recommended is {ratio:.3f} of the best, {'right' if right else 'WRONG'}, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        for each in layouts:
            print(
                f"  dp={each['dp']} sp={each['sp']} {each['schedule']:<11} "
                f"predicted {each['predicted_s'] * 1e3:7.1f} ms{' (as good)' if each['as_good'] else '          '} "
                f"measured {each['measured_s'] * 1e3:7.1f} ms{'  best' if each is best else ''}",
                flush=True,
            )
        jobs.append(
            {
                "batch": batch,
                "seq_len": seq_len,
                "layouts": layouts,
                "recommended_to_best": ratio,
                "right": right,
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
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
