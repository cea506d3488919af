"""Text for the page: nothing that was read from a file reaches HTML, or a terminal, as anything but text."""

from __future__ import annotations

import html
import math

from lasp.terminal import printable


def escape(value: object) -> str:
    """`value` as HTML text or attribute; what cannot be seen is shown as a symbol."""
    return html.escape(printable(str(value)), quote=True)


def number(value: float) -> str:
    """Three digits: "0.00123", "12.3", "1,230", "45.6k", "1.23M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.3g}"


def nbytes(count: float) -> str:
    """ "512 B", "1.5 KiB", "2.0 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def milliseconds(seconds: float) -> str:
    """ "0.4 ms", "31 ms", "1.25 s"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.01 else f"{1e3 * seconds:.0f} ms"
