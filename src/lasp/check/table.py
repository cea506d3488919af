"""Prints a comparison as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lasp.check.compare import BOUNDS, CheckConfig, Row
from lasp.terminal import counted

if TYPE_CHECKING:  # it loads much that no other check needs
    from lasp.check.transformers import ModelReport


def table(config: CheckConfig, rows: Sequence[Row]) -> Table:
    """A row per comparison, each with its verdict."""
    bound = BOUNDS[config.precision]
    options = config.checked_model
    found = Table(
        title=f"{options.family}-{options.size}, {config.batch} x {config.seq_len} tokens over "
        f"{counted(config.sp, 'process', 'processes')} against one process, {config.precision}",
        caption=f"largest relative error over all ranks; must be below {bound:g}",
    )
    for column in ("decay", "exchange", "shards", "loss", "worst gradient", "of", "logits", ""):
        found.add_column(column)
    for row in rows:
        found.add_row(
            row.decay, row.exchange, row.shards, f"{row.loss:.1e}", f"{row.gradient:.1e}", row.parameter,
            f"{row.logits:.1e}", _verdict(row.passes(bound)),
        )  # fmt: skip
    return found


def layer_table(config: CheckConfig, report: ModelReport, bound: float) -> Table:
    """A row for every layer that is split, and one for the whole model by each exchange."""
    found = Table(
        title=f"{report.title}, 2 x {config.seq_len} tokens over "
        f"{counted(config.sp, 'process', 'processes')} against one process, fp64",
        caption=f"largest relative error over all ranks; must be below {bound:g}",
    )
    for column in ("layer", "kind", "computed by", "across ranks", "bytes", "output", "gradients", ""):
        found.add_column(column, overflow="fold")
    for layer, errors in report.layers:
        found.add_row(
            layer.name, layer.layer, ", ".join(layer.operators), layer.exchange, f"{errors.sent_bytes:,}",
            f"{errors.output:.1e}", f"{errors.gradients:.1e}", _verdict(max(errors.output, errors.gradients) < bound),
        )  # fmt: skip
    found.add_section()
    for name, total in report.totals.items():
        worst = max(total.loss, total.logits)
        found.add_row(
            "the model", "", "", name, "", f"{worst:.1e}", f"{total.gradients:.1e}",
            _verdict(max(worst, total.gradients) < bound),
        )  # fmt: skip
    return found


def _verdict(same: bool) -> Text:
    return Text("same", "green") if same else Text("DIFFERENT", "red")
