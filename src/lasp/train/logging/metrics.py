"""Writes metrics.jsonl, one JSON object a line, and a picture of the loss curve.

lasp.train.logging.run_logger says what the lines are.
"""

import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from lasp import files


class MetricsFile:
    """Appends to metrics.jsonl; on resume drops what was written after the checkpoint.

    Lines that are not of a run, as damage leaves them, are left out; the file as it was is then kept beside it. Where a
    line cannot be written it waits, and goes with the next.
    """

    def __init__(self, path: Path, *, finished_steps: int) -> None:
        self.path = path
        self.num_damaged = 0
        self._waiting: list[bytes] = []
        kept = []
        if path.exists():
            content = _content(path)
            found = parse_metrics(content)
            self.num_damaged = found.num_damaged
            if found.num_damaged:
                files.write(path.with_name(f"{path.name}.damaged"), content)
            kept = [line for line in found.lines if line["step"] <= finished_steps]
        files.write(path, "".join(json.dumps(line) + "\n" for line in kept))
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._stream = io.FileIO(os.open(path, flags), "a")

    def write(self, **values: Any) -> None:
        """Raises OSError; the line is kept then."""
        self._waiting.append(json.dumps(values).encode() + b"\n")
        self._drain()

    def close(self) -> None:
        """Raises OSError if lines are left that cannot be written."""
        try:
            self._drain()
        finally:
            self._stream.close()

    def _drain(self) -> None:
        while self._waiting:
            line, length = self._waiting[0], os.fstat(self._stream.fileno()).st_size
            written = 0
            try:
                while written < len(line):
                    written += self._stream.write(line[written:])
            except OSError:
                if written:
                    self._stream.truncate(length)  # half a line would spoil the next
                raise
            del self._waiting[0]


class Metrics(NamedTuple):
    """The lines of a metrics file, in order, each with its "step"; num_damaged: lines that are none."""

    lines: list[dict[str, Any]]
    num_damaged: int


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; those that are damaged, or cut short by a crash, are left out."""
    return parse_metrics(_content(path)).lines if path.exists() else []


def parse_metrics(content: bytes) -> Metrics:
    """The lines of a metrics file. A last one without its end is not counted as damage: a crash leaves that."""
    lines, num_damaged = [], 0
    for line in content.split(b"\n")[:-1]:
        try:
            values = files.parse_json(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and type(values.get("step")) is int:
            lines.append(values)
        else:
            num_damaged += 1
    return Metrics(lines, num_damaged)


def _content(path: Path) -> bytes:
    with files.open_regular(path) as stream:
        return stream.read()


def draw_curve(metrics: Path, picture: Path, *, by_byte: bool, trigram: float | None) -> str | None:
    """Draw training and validation over training tokens. Returns why not, where matplotlib is missing. Raises OSError.

    by_byte: a token is a byte, and both share an axis; else bits per token and bits per byte have one each.
    trigram: score of the byte 3-gram model, drawn as a line to beat.
    """
    try:
        figure = curve_of(read_metrics(metrics), by_byte=by_byte, trigram=trigram)
    except ImportError:
        return "none: matplotlib is not installed (pip install matplotlib)"
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    files.write(picture, drawn.getvalue())
    return None


def curve_of(lines: list[dict[str, Any]], *, by_byte: bool, trigram: float | None) -> Any:
    """The matplotlib figure of `draw_curve`. Raises ImportError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line and "tokens" in line]
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
