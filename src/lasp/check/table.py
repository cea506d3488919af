"""Prints a comparison as a table."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lasp.check.compare import BOUNDS, CheckConfig, Row


def table(config: CheckConfig, rows: Sequence[Row]) -> Table:
    """A row per comparison, each with its verdict."""
    bound = BOUNDS[config.precision]
    options = config.checked_model
    found = Table(
        title=f"{options.family}-{options.size}, {config.batch} x {config.seq_len} tokens over {config.sp} processes "
        f"against one process, {config.precision}",
        caption=f"largest relative error over all ranks; must be below {bound:g}",
    )
    for column in ("decay", "exchange", "shards", "loss", "worst gradient", "of", "logits", ""):
        found.add_column(column)
    for row in rows:
        verdict = Text("same", "green") if row.passes(bound) else Text("DIFFERENT", "red")
        found.add_row(
            row.decay, row.exchange, row.shards, f"{row.loss:.1e}", f"{row.gradient:.1e}", row.parameter,
            f"{row.logits:.1e}", verdict,
        )  # fmt: skip
    return found
