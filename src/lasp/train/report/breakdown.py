"""Breaks down a step's time, memory and bytes: measured by the run, beside what the closed forms say."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from lasp.analysis import volume
from lasp.analysis.memory import training_memory
from lasp.analysis.model import layers
from lasp.models import ModelConfig
from lasp.train.report.run import LoadedRun
from lasp.train.report.text import escape, milliseconds, nbytes

_MOST_RANKS = 16
_WEIGHTS: dict[str, Callable[[int, int], volume.Traffic]] = {
    "ddp": volume.ddp,
    "zero1": volume.zero1,
    "zero2": volume.zero2,
    "zero3": volume.zero3,
}


class Part(NamedTuple):
    """A piece of a bar: what, how much, its colour in the page's palette (0 for grey), what it rests on."""

    name: str
    value: float
    colour: int
    basis: str = ""


def typical_ranks(run: LoadedRun) -> dict[str, list[float]]:
    """Medians over the run's windows, by figure and global rank. Empty before the first window's end."""
    if not run.ranks:
        return {}
    names = run.ranks[0]["ranks"]
    return {
        name: [statistics.median(values) for values in zip(*(line["ranks"][name] for line in run.ranks), strict=True)]
        for name in names
    }


def times(run: LoadedRun, ranks: dict[str, list[float]]) -> str:
    """A bar for every rank: own work, waits, the rest of the step."""
    step_s = statistics.median(line["step_s"] for line in run.steps)
    own, exposed, summing = (ranks[name] for name in ("own_s", "exposed_s", "summing_s"))
    order = sorted(range(len(own)), key=lambda rank: -own[rank])
    shown = sorted(order[:_MOST_RANKS])
    scale = max([step_s, *(own[rank] + exposed[rank] + summing[rank] for rank in shown)])
    rows = []
    for rank in shown:
        rest = max(0.0, step_s - own[rank] - exposed[rank] - summing[rank])
        parts = [
            Part("own work: forward and backward", own[rank], 1),
            Part("waiting for states", exposed[rank], 2),
            Part("waiting for the sum of gradients", summing[rank], 3),
            Part("optimizer and the rest", rest, 0),
        ]
        rows.append(_bar(f"rank {rank}", parts, scale, milliseconds))
    more = f'<p class="note">The {len(shown)} ranks with most work of {len(own)}.</p>' if len(own) > len(shown) else ""
    return _legend(parts) + f'<div class="bars">{"".join(rows)}</div>' + more


def memory(run: LoadedRun) -> str:
    """The peak of the fullest process, and what of it the model's own numbers are."""
    config, about = run.config, run.about
    model, layout = ModelConfig.from_dict(about["model"]), about["layout"]
    batch = config["global_batch"] // layout["dp"] // config["accumulation"]
    tokens = config["seq_len"] // layout["sp"]
    found = training_memory(
        model,
        batch=batch,
        tokens=tokens,
        precision=config["precision"],
        recomputation="none",
        sharding=_sharding(run),
        ranks=layout["dp"] * layout["sp"],
        processors=None,
    )
    measured = float(run.steps[-1]["peak_memory_bytes"])
    parts = [
        Part("weights", found.parameters, 1),
        Part("gradients", found.gradients, 2),
        Part("optimizer", found.optimizer, 3),
        Part("activations", found.activations, 4),
        Part("states kept for the backward pass", found.states, 5),
        Part("buffers", found.buffers, 6),
    ]
    rest = measured - sum(part.value for part in parts)
    if rest > 0:
        on_gpu = about["device"]["type"] == "cuda"
        parts.append(Part("allocator and everything else" if on_gpu else "Python, PyTorch, everything else", rest, 0))
    scale = sum(part.value for part in parts)
    note = (
        f"The fullest process had {nbytes(measured)} at its peak, measured. The coloured parts follow from the "
        "configuration (lasp.analysis.memory); grey is what is left."
    )
    bars = f'<div class="bars">{_bar("peak", parts, scale, nbytes)}</div>'
    return f'{_legend(parts)}{bars}{_table(parts, nbytes)}<p class="note">{note}</p>'


def exchanged(run: LoadedRun, ranks: dict[str, list[float]]) -> str:
    """Bytes that one process sends in a step: counted states, and others by formula."""
    config, about = run.config, run.about
    model, layout = ModelConfig.from_dict(about["model"]), about["layout"]
    size, sp = layout["dp"] * layout["sp"], layout["sp"]
    parts = [Part("states, forward and backward", max(ranks["sent_bytes"]), 1, "counted")]
    if size > 1:
        sharding = _sharding(run)
        moved = _WEIGHTS[sharding](about["num_parameters"], size)
        name = "gradients of weights" if sharding == "ddp" else "weights and their gradients"
        parts.append(Part(name, moved.sent_bytes, 2, f"formula, {sharding}"))
    if sp > 1:
        mixer = model.mixer_of(0)
        shard = volume.ShardShape(
            batch=config["global_batch"] // layout["dp"],
            tokens=config["seq_len"] // sp,
            d_model=model.d_model,
            heads=mixer.num_heads,
            key_heads=mixer.num_heads,
            key_dim=mixer.key_dim,
            value_dim=mixer.value_dim,
            itemsize=2 if config["precision"] == "bf16" else 4,
        )
        ring = len(layers(model)) * volume.ring_attention(shard, 0, sp).step.sent_bytes
        parts.append(Part("instead of states: Ring Attention's keys and values", ring, 0, "formula, for comparison"))
    scale = max(part.value for part in parts) or 1.0
    rows = "".join(
        f'<tr><th>{escape(part.name)}</th><td class="cell"><i class="f{part.colour}" '
        f'style="width:{100 * part.value / scale:.2f}%"></i></td>'
        f"<td>{nbytes(part.value)}</td><td class='muted'>{part.basis}</td></tr>"
        for part in parts
    )
    note = ""
    if sp > 1:
        times = parts[-1].value * 64 / parts[0].value if parts[0].value else 0.0
        note = (
            '<p class="note">What one process sends in one step. States do not grow with the sequence: with one 64 '
            f"times as long they would be the same, and Ring Attention would send {times:,.0f} times as much.</p>"
        )
    return f'<table class="amounts">{rows}</table>{note}'


def _sharding(run: LoadedRun) -> str:
    """The name in lasp.parallelize of how weights are spread."""
    return str(run.config["parallel"].get("data_parallel", "ddp"))


def _bar(name: str, parts: list[Part], scale: float, text: Any) -> str:
    pieces = "".join(
        f'<i class="f{part.colour}" style="width:{100 * part.value / scale:.3f}%" '
        f'title="{escape(part.name)}: {text(part.value)}"></i>'
        for part in parts
    )
    return f'<div class="bar"><span>{escape(name)}</span><div>{pieces}</div></div>'


def _legend(parts: list[Part]) -> str:
    keys = "".join(f'<span class="key block c{part.colour}"><i></i>{escape(part.name)}</span>' for part in parts)
    return f'<div class="legend">{keys}</div>'


def _table(parts: list[Part], text: Any) -> str:
    cells = "".join(f"<div><b>{text(part.value)}</b>{escape(part.name)}</div>" for part in parts)
    return f'<div class="amount-grid">{cells}</div>'
