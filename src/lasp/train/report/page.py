"""The page itself: sections in the order in which one asks about a run."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import statistics
from importlib.resources import files
from typing import Any

from lasp.terminal import counted
from lasp.train.config import TrainConfig
from lasp.train.logging.metrics import smoothed
from lasp.train.logging.step_metrics import SLOW, SLOW_S
from lasp.train.position import settle
from lasp.train.report import breakdown
from lasp.train.report.chart import Series, chart
from lasp.train.report.layout import drawing
from lasp.train.report.run import LoadedRun
from lasp.train.report.text import escape, nbytes, number
from lasp.train.settings_file import to_dict

SECTIONS = ("curves", "layout", "time", "memory", "exchange", "text", "settings", "versions")
_MOST_LINES = 8


def render(run: LoadedRun) -> str:
    """The whole page: HTML that refers to nothing outside itself."""
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    # Only this script runs, whatever a file of the run may hold, and nothing is loaded from anywhere.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ranks = breakdown.typical_ranks(run)
    sections = {
        "curves": _curves(run),
        "layout": f'<div class="scrolled">{drawing(run, ranks)}</div>',
        "time": breakdown.times(run, ranks) + _skew(run) if ranks else "",
        "memory": breakdown.memory(run),
        "exchange": breakdown.exchanged(run, ranks) if ranks else "",
        "text": _sample(run),
        "settings": _settings(run),
        "versions": _pairs(run.about["versions"] | {"device": run.about["device"]["name"]}),
    }
    body = "".join(
        f'<section id="{name}"><h2>{_TITLES[name]}</h2>{sections[name]}</section>'
        for name in SECTIONS
        if sections[name]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(run.name)} · LASP</title>'
        f"<style>{style}</style></head><body><main>{_head(run)}{body}"
        "<footer>Made by <code>lasp report</code> from the run's own files. One file, nothing is loaded.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


_TITLES = {
    "curves": "Curves",
    "layout": "Layout",
    "time": "Where the time goes",
    "memory": "Memory",
    "exchange": "Bytes sent",
    "text": "Generated text",
    "settings": "Settings",
    "versions": "Versions",
}


def _head(run: LoadedRun) -> str:
    about, layout, last = run.about, run.about["layout"], run.steps[-1]
    total = run.config["steps"]
    state = "finished" if run.finished >= total else f"{run.finished:,} of {total:,} steps"
    kind = about["device"]["type"]
    processes = counted(layout["dp"] * layout["sp"], f"{kind} process", f"{kind} processes")
    line = (
        f"{number(about['num_parameters'])} parameters · {counted(total, 'step')} of {run.config['global_batch']} × "  # noqa: RUF001
        f"{run.config['seq_len']:,} tokens · dp {layout['dp']} × sp {layout['sp']} on {processes} "  # noqa: RUF001
        f"· {run.config['precision']}"
    )
    source = about["text"]
    text = (
        f"Trained on {escape(source['source'])}: {nbytes(source['num_bytes']['train'])} in "
        f"{counted(source['num_documents']['train'], 'document')}, {nbytes(source['num_bytes']['validation'])} in "
        f"{source['num_documents']['validation']:,} held out. Started {escape(about['started'])}."
    )
    cards = "".join(
        f'<div class="card"><b>{value}</b><span>{escape(name)}</span><small>{escape(more)}</small></div>'
        for name, value, more in _cards(run, last)
    )
    return (
        f'<header><p class="kicker">LASP training report <span class="state">{escape(state)}</span></p>'
        f'<h1>{escape(run.name)}</h1><p class="lead">{escape(line)}</p><p class="muted">{text}</p></header>'
        f'<div class="cards">{cards}</div>'
    )


def _cards(run: LoadedRun, last: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and remark of the figures one looks for first."""
    cards = []
    if run.validations:
        bits = run.validations[-1]["validation_bits_per_byte"]
        more = "" if run.trigram is None else f"byte 3-gram: {run.trigram:.3f}"
        cards.append(("bits per byte, held out", f"{bits:.3f}", more))
    recent = run.steps[-20:]
    cards.append(
        ("training loss, nats per token", f"{statistics.fmean(s['loss'] for s in recent):.3f}", "last 20 steps")
    )
    speed = statistics.median(step["tokens_per_s"] for step in run.steps)
    cards.append(("tokens per second", number(speed), "all processes, median"))
    if "mfu" in last:
        mfu = statistics.median(step["mfu"] for step in run.steps)
        cards.append(("model FLOP utilisation", f"{mfu:.1%}", f"of {number(run.about['peak_flops'] / 1e12)} TFLOP/s"))
    cards.append(("peak memory", nbytes(last["peak_memory_bytes"]), "fullest process"))
    if run.about["layout"]["sp"] > 1:
        cards.append(("states sent in a step", nbytes(last["exchanged_bytes"]), "all processes"))
        waiting = statistics.median(step["exposed_s"] / step["step_s"] for step in run.steps)
        cards.append(("waiting for states", f"{waiting:.0%}", "of a step, mean of ranks"))
    return cards


def _curves(run: LoadedRun) -> str:
    steps = [line["step"] for line in run.steps]
    bits = [line["loss"] / math.log(2) for line in run.steps]
    training = [
        Series("every step", steps, bits, "faint", 1),
        Series("training, smoothed", steps, smoothed(bits), "line", 1),
    ]
    scored = [line["step"] for line in run.validations]
    held_out = [
        Series("held-out text", scored, [line["validation_bits_per_byte"] for line in run.validations], "dots", 2)
    ]
    if run.trigram is not None:
        held_out.append(Series("byte 3-gram, held-out text", [], [run.trigram], "level", 0))
    # A token of a vocabulary is several bytes: its bits and a byte's have no axis in common.
    if run.about["text"]["tokenizer"] == "bytes":
        figures = [chart("Bits per byte", training + held_out, wide=True)]
    else:
        figures = [chart("Bits per token", training, wide=True), chart("Bits per byte", held_out, wide=True)]
    norms = [line["grad_norm"] for line in run.steps]
    clip = run.config["optimizer"]["clip_norm"]
    figures.append(chart("Learning rate", [Series("learning rate", steps, _of(run, "lr"), "line", 3)], zero=True))
    figures.append(
        chart(
            "Gradient norm",
            [
                Series("every step", steps, norms, "faint", 5),
                Series("smoothed", steps, smoothed(norms), "line", 5),
                Series("clipped to", [], [clip], "level", 0),
            ],
            zero=True,
            top=_most(norms),
        )
    )
    speeds = _of(run, "tokens_per_s")
    figures.append(
        chart(
            "Tokens per second",
            [Series("every step", steps, speeds, "faint", 4), Series("smoothed", steps, smoothed(speeds), "line", 4)],
            zero=True,
        )
    )
    exposed, hidden = ([1e3 * value for value in smoothed(_of(run, name))] for name in ("exposed_s", "hidden_s"))
    if run.about["layout"]["sp"] > 1:
        figures.append(
            chart(
                "Exchange of states, ms",
                [
                    Series("waited for", steps, exposed, "line", 2),
                    Series("hidden, at most", steps, hidden, "line", 1),
                ],
                zero=True,
            )
        )
    return f'<div class="charts">{"".join(figures)}</div>'


def _skew(run: LoadedRun) -> str:
    """Own work of the ranks over time, and what was said about slow ones."""
    at = [line["step"] for line in run.ranks]
    own = [[1e3 * value for value in line["ranks"]["own_s"]] for line in run.ranks]
    count = len(own[0])
    if count == 1:
        return ""
    if count <= _MOST_LINES:
        series = [Series(f"rank {rank}", at, [row[rank] for row in own], "line", rank % 6 + 1) for rank in range(count)]
    else:
        series = [
            Series("slowest rank", at, [max(row) for row in own], "line", 2),
            Series("median rank", at, [statistics.median(row) for row in own], "line", 1),
            Series("fastest rank", at, [min(row) for row in own], "line", 4),
        ]
    said = [f"step {line['step']}: {line['slow']}" for line in run.ranks if line.get("slow")]
    note = (
        f"No rank was slow: none had {SLOW} times the work of the others, and {1e3 * SLOW_S:.0f} ms more, in most "
        "steps of a window."
    )
    if said:
        note = f"In {len(said)} of {len(run.ranks)} windows one rank was slow; last at {said[-1]}."
    return '<div class="charts">' + chart("Own work, ms a step", series, wide=True, zero=True, note=note) + "</div>"


def _sample(run: LoadedRun) -> str:
    if not run.sample:
        return '<p class="muted">None was generated.</p>'
    prompt = run.about.get("sample_prompt") or run.config["sample"]["prompt"] or ""
    head, rest = ("", run.sample)
    if run.sample.startswith(prompt):
        head, rest = prompt, run.sample[len(prompt) :]
    return f'<pre class="sample"><b>{escape(head)}</b>{escape(rest)}</pre>'


def _is_usual(value: Any, default: Any) -> bool:
    """True if a setting is the default; a path, which is recorded in full, may begin otherwise."""
    return value == default or (isinstance(value, str) and default and value.endswith(f"/{default}"))


def _settings(run: LoadedRun) -> str:
    default = to_dict(settle(dataclasses.replace(TrainConfig(), steps=run.config["steps"]), None))
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in run.config.items():
        if isinstance(value, dict):
            groups[name] = value
        else:
            groups["run"][name] = value
    parts = []
    for group, values in groups.items():
        usual = default if group == "run" else default.get(group, {})
        rows = "".join(
            f"<tr{'' if _is_usual(value, usual.get(name)) else ' class=changed'}>"
            f"<th>{escape(name)}</th><td>{escape('default' if value is None else value)}</td></tr>"
            for name, value in values.items()
        )
        parts.append(f"<div><h3>{escape(group)}</h3><table>{rows}</table></div>")
    fields = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape('none' if value is None else value)}</td></tr>"
        for name, value in _model_fields(run.about["model"])
    )
    parts.append(f"<div><h3>the model in full</h3><table>{fields}</table></div>")
    return (
        '<p class="muted">Settings that differ from the defaults stand out.</p>'
        f'<div class="columns">{"".join(parts)}</div>'
    )


def _model_fields(model: dict[str, Any]) -> list[tuple[str, Any]]:
    """The model's fields, then those of each kind of mixer in it."""
    mixers = model["mixer"]
    if isinstance(mixers, str):  # written before mixers had configurations of their own
        return list(model.items())
    mixers = mixers if isinstance(mixers, list) else [mixers]
    fields = {**model, "mixer": ", ".join(each["kind"] for each in mixers)}
    fields |= {f"{each['kind']}: {name}": each[name] for each in mixers for name in each if name != "kind"}
    return list(fields.items())


def _pairs(values: dict[str, Any]) -> str:
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in values.items())
    return f'<div class="amount-grid">{cells}</div>'


def _of(run: LoadedRun, name: str) -> list[float]:
    return [float(line[name]) for line in run.steps]


def _most(values: list[float]) -> float:
    """A height that leaves out the highest hundredth."""
    return 1.1 * sorted(values)[int(0.99 * (len(values) - 1))]


def _resource(name: str) -> str:
    return files("lasp.train.report").joinpath(name).read_text(encoding="utf-8").strip()
