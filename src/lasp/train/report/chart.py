"""Line charts as inline SVG: colours come from the page's style, values for the pointer from data attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lasp.train.report.text import escape, number

Scale = Callable[[float], float]
_MOST_POINTS = 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 30
# Drawn twice, at about the size at which it is seen: scaled to a telephone, the text of a wide drawing is 3 px high.
_WIDE, _HALF, _NARROW = (1040, 300), (510, 230), (360, 220)


class Series(NamedTuple):
    """One line.

    Attributes:
        name: for the legend and the pointer.
        x, y: its points, x ascending.
        style: of the page's style sheet: "line", "faint", "dots" (joined by a thin line) or "level" (one value).
        colour: number of the page's palette, from 1.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    colour: int = 1


def chart(
    title: str,
    series: Sequence[Series],
    *,
    wide: bool = False,
    zero: bool = False,
    top: float | None = None,
    x_name: str = "step",
    note: str = "",
) -> str:
    """A figure with a legend.

    Args:
        zero: the vertical axis starts at zero, else a little below the lowest value.
        top: values above it are cut off.
        note: text below.
    """
    series = [one for one in series if len(one.y) > 0]
    values = [value for one in series for value in one.y if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    high = high if top is None else min(high, top)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = 0.0 if zero else low - margin, high + margin
    xs = [x for one in series for x in one.x]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    last = last if last > first else first + 1
    drawings = "".join(
        _drawing(title, series, name, *size, (first, last), (low, high), x_name)
        for name, size in (("broad", _WIDE if wide else _HALF), ("narrow", _NARROW))
    )
    legend = "".join(
        f'<span class="key c{one.colour} {one.style}"><i></i>{escape(one.name)}<b></b></span>' for one in series
    )
    data = json.dumps([{"n": one.name, "x": _shorter(one)[0], "y": _shorter(one)[1]} for one in series])
    return (
        f'<figure class="chart{" wide" if wide else ""}" data-series="{escape(data)}">'
        f'<figcaption><h3>{escape(title)}</h3><div class="legend">{legend}</div></figcaption>'
        + drawings
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _drawing(
    title: str,
    series: Sequence[Series],
    name: str,
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_name: str,
) -> str:
    across = partial(_between, *x_range, _LEFT, width - _RIGHT)
    down = partial(_between, y_range[1], y_range[0], _TOP, height - _BOTTOM)
    parts = [_grid(width, height, *y_range, down), _x_axis(width, height, *x_range, across, x_name)]
    parts += [_line(one, width, height, across, down) for one in series]
    parts.append(f'<line class="pointer" y1="{_TOP}" y2="{height - _BOTTOM}" hidden=""/>')
    scale = json.dumps([*x_range, _LEFT, width - _RIGHT, width])
    return (
        f'<svg class="{name}" data-scale="{escape(scale)}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _between(first: float, last: float, start: float, end: float, value: float) -> float:
    """`value` on the way from first to last, as a place between start and end."""
    return start + (value - first) / (last - first) * (end - start)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values between two."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _grid(width: float, height: float, low: float, high: float, down: Scale) -> str:
    lines = []
    for value in ticks(low, high, 5):
        y = down(value)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    return "".join(lines)


def _x_axis(width: float, height: float, first: float, last: float, across: Scale, name: str) -> str:
    base = height - _BOTTOM
    marks = [f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>']
    for value in ticks(first, last, 6 if width > _NARROW[0] else 4):
        marks.append(
            f'<text class="tick" x="{across(value):.1f}" y="{base + 17}" text-anchor="middle">{number(value)}</text>'
        )
    marks.append(f'<text class="tick" x="{_LEFT - 22}" y="{base + 17}" text-anchor="end">{escape(name)}</text>')
    return "".join(marks)


def _line(one: Series, width: float, height: float, across: Scale, down: Scale) -> str:
    if one.style == "level":
        return f'<path class="level c{one.colour}" d="M{_LEFT} {down(one.y[0]):.1f}H{width - _RIGHT}"/>'
    x, y = _shorter(one)
    floor = height - _BOTTOM
    points = [(across(a), min(floor, max(0.0, down(b)))) for a, b in zip(x, y, strict=True)]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    drawn = f'<path class="{one.style} c{one.colour}" d="{path}"/>'
    if one.style == "dots" or len(points) == 1:
        drawn += "".join(f'<circle class="c{one.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points)
    return drawn


def _shorter(one: Series) -> tuple[list[float], list[float]]:
    """Finite points of a line, neighbours averaged where there are too many to draw."""
    points = [(a, b) for a, b in zip(one.x, one.y, strict=False) if math.isfinite(b)]
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return (
        [float(f"{sum(a for a, _ in group) / len(group):.6g}") for group in groups],
        [float(f"{sum(b for _, b in group) / len(group):.5g}") for group in groups],
    )
