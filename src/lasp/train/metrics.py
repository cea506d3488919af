"""What a run leaves to be read: one JSON object a line in metrics.jsonl, and a picture of the loss curve.

lasp.train.observe says what the lines are.
"""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to metrics.jsonl; on resume drops what was written after the checkpoint."""

    def __init__(self, path: Path, *, finished_steps: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= finished_steps]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._stream = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, **values: Any) -> None:
        self._stream.write(json.dumps(values) + "\n")

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def draw_curve(metrics: Path, picture: Path, *, by_byte: bool, trigram: float | None) -> str | None:
    """Draw training and validation over training tokens. Returns why not, where matplotlib is missing.

    by_byte: a token is a byte, and both share an axis; else bits per token and bits per byte have one each.
    trigram: score of the byte 3-gram model, drawn as a line to beat.
    """
    try:
        figure = curve_of(read_metrics(metrics), by_byte=by_byte, trigram=trigram)
    except ImportError:
        return "no loss curve: matplotlib is not installed (pip install matplotlib)"
    figure.savefig(picture)
    return None


def curve_of(lines: list[dict[str, Any]], *, by_byte: bool, trigram: float | None) -> Any:
    """The matplotlib figure of `draw_curve`. Raises ImportError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "validation_bits_per_byte" in line]
    tokens_at = {line["step"]: line["tokens"] / 1e6 for line in steps}
    figure = Figure(figsize=(7, 4 if by_byte else 7), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1 if by_byte else 2, 1, 1)
    held_out = axes if by_byte else figure.add_subplot(2, 1, 2, sharex=axes)
    x = [line["tokens"] / 1e6 for line in steps]
    losses = [line["loss"] / math.log(2) for line in steps]
    axes.plot(x, losses, lw=0.6, alpha=0.35, color="tab:blue")
    axes.plot(x, smoothed(losses), lw=1.2, color="tab:blue", label="training, smoothed over 20 steps")
    scored = [line for line in scores if line["step"] in tokens_at]
    held_out.plot(
        [tokens_at[line["step"]] for line in scored],
        [line["validation_bits_per_byte"] for line in scored],
        "o-",
        ms=4,
        color="tab:orange",
        label="validation",
    )
    if trigram is not None:
        held_out.axhline(trigram, ls="--", lw=1, color="tab:gray", label="byte 3-gram, validation")
    held_out.set_xlabel("training tokens (millions)")
    axes.set_ylabel("bits per byte" if by_byte else "bits per token")
    held_out.set_ylabel("bits per byte")
    for each in {axes, held_out}:
        each.grid(alpha=0.3)
        each.legend(frameon=False)
    figure.tight_layout()
    return figure


def smoothed(values: list[float], span: int = 20) -> list[float]:
    """Exponential mean over about `span` values, without a pull towards zero at the start."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean += (value - mean) * 2 / (span + 1)
        weight += (1 - weight) * 2 / (span + 1)
        smooth.append(mean / weight)
    return smooth
