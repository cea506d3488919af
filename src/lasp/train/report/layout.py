"""The parallel layout as a drawing: who holds which tokens, and who sends what to whom."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lasp.train.report.run import LoadedRun
from lasp.train.report.text import escape, milliseconds

_MOST_RANKS, _MOST_ROWS = 4, 4
_BOX, _GAP, _LEFT, _RIGHT, _TOP, _ROW = 92, 40, 142, 186, 44, 140
_WIDTH = 1040
# Schedules in which every rank of a sequence hears from every other.
_TO_ALL = ("all_gather", "all_to_all")


def drawing(run: LoadedRun, ranks: dict[str, list[float]]) -> str:
    """SVG of the ranks as boxes, a row for each group that shares sequences.

    ranks: typical times by global rank, see lasp.train.step_timer.RankStep; empty if none were written yet.
    """
    layout = run.about["layout"]
    dp, sp = int(layout["dp"]), int(layout["sp"])
    columns = _shown(sp, _MOST_RANKS)
    rows = _shown(dp, _MOST_ROWS)
    width = (_WIDTH - _LEFT - _RIGHT - _GAP * (len(columns) - 1)) / len(columns)
    width = min(330.0, width)
    parts = []
    for index, row in enumerate(rows):
        y = _TOP + index * _ROW
        if row is None:
            parts.append(f'<text class="muted" x="16" y="{y + _BOX / 2}">… {dp - len(rows) + 1} more groups</text>')
            continue
        parts.append(_row(run, row, columns, y, width, ranks))
    bottom = _TOP + (len(rows) - 1) * _ROW + _BOX
    right = _LEFT + len(columns) * width + (len(columns) - 1) * _GAP
    if dp * sp > 1:
        parts.append(_sum(dp * sp, right + 22, _TOP, bottom))
    height = bottom + 30
    return (
        f'<svg class="layout" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{dp} groups of {sp} ranks">{_MARKERS}{"".join(parts)}</svg>'
    )


def _row(run: LoadedRun, row: int, columns: list[int | None], y: float, width: float, ranks: dict[str, Any]) -> str:
    layout, config = run.about["layout"], run.config
    dp, sp = int(layout["dp"]), int(layout["sp"])
    each = config["global_batch"] // dp
    first = row * each + 1
    packed = bool(config["data"].get("packed"))
    # Packed, the rows of a group are one sequence of documents.
    tokens = config["seq_len"] * (each if packed else 1) // sp
    named = f"sequence {first}" if each == 1 else f"sequences {first}–{first + each - 1}"  # noqa: RUF001
    parts = [
        f'<text class="label" x="16" y="{y + 40}">{named}</text>',
        f'<text class="muted" x="16" y="{y + 58}">{"packed in one" if packed else "of every step"}</text>',
    ]
    places: list[float] = []
    for index, column in enumerate(columns):
        x = _LEFT + index * (width + _GAP)
        if column is None:
            parts.append(f'<text class="muted" x="{x + width / 2}" y="{y + 50}" text-anchor="middle">…</text>')
        else:
            rank = row * sp + column
            parts.append(_box(rank, column * tokens, tokens, x, y, width, ranks, _host(layout["hosts"], rank)))
        places.append(x)
    if sp > 1:
        parts.append(_exchange(str(layout["exchange"]), places, y, width, whole=None not in columns, told=row == 0))
    return "".join(parts)


def _box(rank: int, start: int, tokens: int, x: float, y: float, width: float, ranks: dict[str, Any], host: str) -> str:
    held = f"{start:,}–{start + tokens - 1:,}"  # noqa: RUF001
    held = held if width < 220 else f"tokens {held}"
    parts = [
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{_BOX}" rx="9"/>',
        f'<text class="label" x="{x + 14}" y="{y + 26}">rank {rank}</text>',
        f'<text class="muted" x="{x + width - 14}" y="{y + 26}" text-anchor="end">{escape(host)}</text>',
        f'<text class="muted" x="{x + 14}" y="{y + 45}">{held}</text>',
    ]
    if ranks:
        own, waits = ranks["own_s"][rank], ranks["exposed_s"][rank] + ranks["summing_s"][rank]
        inner = width - 28
        said = f"{milliseconds(own)} own work, {milliseconds(waits)} waiting"
        if width < 220:
            said = f"{milliseconds(own)}, waits {milliseconds(waits)}"
        share = own / (own + waits) if own + waits > 0 else 1.0
        parts += [
            f'<rect class="f4" x="{x + 14}" y="{y + 57}" width="{inner:.1f}" height="6" rx="3"/>',
            f'<rect class="f1" x="{x + 14}" y="{y + 57}" width="{inner * share:.1f}" height="6" rx="3"/>',
            f'<text class="small" x="{x + 14}" y="{y + 80}">{said}</text>',
        ]
    return "".join(parts)


def _exchange(schedule: str, places: list[float], y: float, width: float, *, whole: bool, told: bool) -> str:
    """Arrows between the boxes of a row: states forward above, their gradients backward below.

    whole: no rank is left out, so that arrows over several can be drawn. told: with a legend.
    """
    name = schedule.split()[0].split("(")[0]
    parts = []
    pairs = list(pairwise(places))
    if name in _TO_ALL or name == "hierarchical":
        centres = [x + width / 2 for x in places]
        for level, css, rise in ((y - 14, "forward", 1), (y + _BOX + 14, "backward", -1)):
            edge = y if rise > 0 else y + _BOX
            parts.append(f'<path class="{css}" d="M{centres[0]} {level}H{centres[-1]}"/>')
            parts += [f'<path class="{css} arrow" d="M{x} {level}V{edge - 3 * rise}"/>' for x in centres]
    else:
        for left, right in pairs:
            start, end = left + width, right
            parts.append(f'<path class="forward arrow" d="M{start + 4} {y + 30}H{end - 6}"/>')
            parts.append(f'<path class="backward arrow" d="M{end - 4} {y + 62}H{start + 6}"/>')
    if name == "doubling" and whole:
        for distance in (2, 4):
            for left, right in zip(places, places[distance:], strict=False):
                a, b = left + width / 2, right + width / 2
                parts.append(f'<path class="forward arrow" d="M{a} {y - 2}C{a} {y - 24} {b} {y - 24} {b} {y - 3}"/>')
    if told:
        x = places[0] + width / 2 if name in (*_TO_ALL, "hierarchical") else places[0]
        what = "to all" if name in _TO_ALL else "to the next"
        parts.append(
            f'<text class="small" x="{x}" y="16"><tspan class="t1">→ forward: states {what}</tspan>'
            f'<tspan dx="16" class="t2">← backward: their gradients</tspan>'
            f'<tspan dx="16">({escape(schedule)})</tspan></text>'
        )
    return "".join(parts)


def _sum(count: int, x: float, top: float, bottom: float) -> str:
    middle = (top + bottom) / 2
    return (
        f'<path class="sum" d="M{x} {top}h10V{bottom}h-10"/>'
        f'<text class="small" x="{x + 20}" y="{middle - 4}">gradients of weights</text>'
        f'<text class="small" x="{x + 20}" y="{middle + 12}">summed over {count} ranks</text>'
    )


def _shown(count: int, most: int) -> list[int | None]:
    """Numbers of what is drawn; None for what is left out."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def _host(hosts: list[int], rank: int) -> str:
    """ "host 2", counted from 1; nothing where there is only one."""
    if len(hosts) == 1:
        return ""
    for index, ranks in enumerate(hosts):
        if rank < ranks:
            return f"host {index + 1}"
        rank -= ranks
    return ""


_MARKERS = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
)
