"""A plan as plain values: for JSON, for the table and for the plot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lasp.analysis.measured import measured, slowdowns
from lasp.analysis.model import num_parameters
from lasp.analysis.planner import METHODS, Estimate, Job, best, estimate, layouts, longest, nodes_of, problem

BASIS = {
    "memory": "derived: weights, gradients and AdamW in fp32; activations as listed by lasp.analysis.memory, compared "
    "with what PyTorch saves; capacity and usable share: see device.memory",
    "received_bytes": "derived: lasp.analysis.volume, equal to counted bytes",
    "compute": "derived: roofline over the device's figures (device.flops, device.bandwidth, device.softmax)",
    "kernels": "measured on an H100: other recurrences' kernels relative to scalar decay's",
    "exchange": "derived: the schedules' own cost model; its constants: device.network",
    "overlap": "assumed: weights and gradients hide behind 75 % of backward and, gathered, half of forward; the "
    "exchange behind the local part of attention's backward pass",
    "step floor": "device.host",
}

NOT_MEASURED = (
    "not measured: no step of such a model on such a device, run so, is known; times are the roofline's, of which "
    "measured ones on GPUs took {:.2f} to {:.2f} times as much; memory is that of eager blocks in PyTorch's operators"
)

# Steps whose predictions differ by less are not told apart: quartiles of one layout's measured steps span as much, and
# so do the errors of two layouts' predictions against each other (docs/results/predictions.md).
TIE = 0.05
# What `lasp train` does unless told otherwise, and what was measured (benchmarks/plan_check.py).
TRAINED_SHARDINGS = ("ddp",)
TRAINED_RECOMPUTATIONS = ("none",)
# What it can be told to do. The other methods are modelled to compare with.
TRAINED_METHODS = ("lasp", "data")


def row(estimate: Estimate) -> dict[str, Any]:
    """One estimate in plain values: bytes, seconds, tokens/s."""
    layout = estimate.layout
    return {
        **layout._asdict(),
        "fits": estimate.fits,
        "memory_bytes": estimate.memory.total,
        "memory": estimate.memory._asdict(),
        "tokens_per_s": estimate.tokens_per_s,
        "step_s": estimate.step_s,
        "compute_s": estimate.compute_s,
        "exposed_communication_s": estimate.exposed_s,
        "sequence_communication_s": estimate.sequence_s,
        "weight_communication_s": estimate.data_s,
        "communication_share": estimate.communication_share,
        "received_bytes": estimate.received_bytes,
    }


def why_not(job: Job, method: str) -> str:
    """The reason that a method has no layout, at the largest division that the devices allow."""
    if method == "data":
        return f"a batch of {job.batch} cannot be spread over {job.devices} devices"
    reasons = [problem(job, method, sp) for sp in range(job.devices, 1, -1) if job.devices % sp == 0]
    return next((reason for reason in reasons if reason is not None), "one device has nothing to divide")


def plan(job: Job, *, compiled: bool = False) -> dict[str, Any]:
    """Every method's best layout, the recommended one, and what the numbers rest on.

    compiled: blocks run compiled. Where such steps were measured, times are scaled to theirs; else the rates have a
    range, by what others were measured to take.
    """
    steps, (least, most) = measured(job.config, job.device.name, compiled=compiled), slowdowns(compiled=compiled)
    job = replace(job, compiled=compiled)
    job = job if steps is None else replace(job, slowdown=steps.slowdown, kept=steps.kept)
    methods: list[dict[str, Any]] = []
    for method in METHODS:
        found = best(job, method)
        entry: dict[str, Any] = {"method": method}
        if found is None:
            entry |= {"fits": False, "reason": why_not(job, method)}
        else:
            entry |= row(found)
        entry["longest_tokens"] = longest(job.config, job.device, job.devices, method, batch=job.batch)
        methods.append(entry)
    fitting = alternatives(job)
    recommended = next(iter(fitting), None)
    trained = next((each for each in fitting if trains(each)), None)
    runs = next((each for each in fitting if each["method"] in TRAINED_METHODS), None)
    return {
        "model_parameters": num_parameters(job.config),
        "device": job.device.name,
        "devices": job.devices,
        "hosts": len(nodes_of(job.device, job.devices)),
        "seq_len": job.seq_len,
        "batch": job.batch,
        "capacity_bytes": job.device.memory_bytes * job.device.memory_share,
        "recommended": recommended,
        "ties": ties(recommended, fitting),
        "precision": job.device.precision,
        "recommended_of_lasp_train": runs,
        "recommended_for_lasp_train": trained,
        "ties_for_lasp_train": ties(trained, [each for each in fitting if trains(each)]),
        "tie": TIE,
        "methods": methods,
        "compiled": compiled,
        "measured": None if steps is None else steps.source,
        # Of tokens/s, relative to those named.
        "range": [1.0, 1.0] if steps is not None else [1 / most, 1 / least],
        "rests_on": BASIS
        | {
            "steps": NOT_MEASURED.format(least, most)
            if steps is None
            else f"measured: {steps.slowdown:.2f} times the roofline's time, {steps.kept:.2f} times what is listed of "
            f"activations; benchmarks/results/{steps.source}"
        }
        | {f"device.{name}": source for name, source in job.device.sources.items()},
    }


def ties(recommended: dict[str, Any] | None, fitting: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layouts of `fitting`, beside the recommended one, whose predicted steps are longer by less than `TIE`."""
    if recommended is None:
        return []
    limit = recommended["step_s"] * (1 + TIE)
    return [each for each in fitting if each is not recommended and each["step_s"] <= limit]


def trains(entry: dict[str, Any]) -> bool:
    """True if `lasp train` runs a layout without further options."""
    trained = entry["sharding"] in TRAINED_SHARDINGS and entry["recomputation"] in TRAINED_RECOMPUTATIONS
    return trained and entry["method"] in TRAINED_METHODS


def alternatives(job: Job) -> list[dict[str, Any]]:
    """All layouts that fit and train the same model, the fastest first.

    Softmax attention in the recurrences' place (`ring`) is another model.
    """
    found = [
        estimate(job, layout)
        for method in METHODS
        if method != "ring"
        for layout in layouts(job, method, every_schedule=True)
    ]
    return [row(each) for each in sorted((e for e in found if e.fits), key=lambda each: each.step_s)]


def curves(job: Job) -> dict[str, Any]:
    """Curves for the plot: bytes received against length, and longest sequence and throughput against devices."""
    lengths = [1 << power for power in range(11, max(job.seq_len.bit_length(), 22))]
    counts = [1 << power for power in range(max(job.devices.bit_length() + 1, 4))]
    result: dict[str, Any] = {"lengths": lengths, "devices": counts, "volume": {}, "longest": {}, "throughput": {}}
    for method in METHODS:
        volume, longest_tokens, throughput = [], [], []
        for seq_len in lengths:
            found = best(
                Job(config=job.config, device=job.device, devices=job.devices, seq_len=seq_len, batch=1), method
            )
            volume.append(found.received_bytes if found is not None and found.layout.sp > 1 else None)
        for devices in counts:
            longest_tokens.append(longest(job.config, job.device, devices, method) or None)
            same = Job(config=job.config, device=job.device, devices=devices, seq_len=job.seq_len, batch=job.batch)
            found = best(same, method)
            throughput.append(found.tokens_per_s if found is not None and found.fits else None)
        result["volume"][method] = volume
        result["longest"][method] = longest_tokens
        result["throughput"][method] = throughput
    return result
