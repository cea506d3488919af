"""Text for the page: nothing that was read from a file reaches HTML, or a terminal, as anything but text."""

from __future__ import annotations

import html
import math
import re

# Control characters but for line ends and tabs, and those that turn the direction of text or hide in it.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")


def escape(value: object) -> str:
    """`value` as HTML text or attribute; what cannot be seen is shown as a symbol."""
    return html.escape(_UNSEEN.sub(_shown, str(value)), quote=True)


def _shown(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


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
