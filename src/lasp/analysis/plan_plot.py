"""A plan as a picture (extra `report`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lasp.analysis.plan_text import length_text


def plot(found: dict[str, Any], curves: dict[str, Any], path: Path) -> None:
    """Draw volume against length, longest sequence and throughput against devices, to the file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    parts = (
        ("volume", "lengths", "tokens of the sequence", "bytes received by a rank, a step"),
        ("longest", "devices", "devices", "longest sequence, tokens"),
        ("throughput", "devices", "devices", f"tokens/s at {length_text(found['seq_len'])}"),
    )
    for axes, (name, along, x_label, y_label) in zip(panels, parts, strict=True):
        for method, values in curves[name].items():
            points = [(x, y) for x, y in zip(curves[along], values, strict=True) if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=method, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{found['model']} on {found['device']}, predicted", fontsize=11)
    figure.savefig(path, dpi=110)
