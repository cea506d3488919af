"""Puts the tables of what is registered into the docs anew: `python docs/tables.py`.

A page has them between the marks `<!-- presets -->` and `<!-- end of presets -->`, and likewise `mixers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lasp.models import mixer_table, parameter_table


def written(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table that it has as the code gives it."""
    for name, table in tables.items():
        marks = re.compile(f"(<!-- {name} -->\\n).*?(\\n<!-- end of {name} -->)", re.DOTALL)
        page = marks.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", page)
    return page


if __name__ == "__main__":
    tables = {"presets": parameter_table(), "mixers": mixer_table()}
    for path in sorted(Path(__file__).parent.rglob("*.md")):
        before = path.read_text()
        if (after := written(before, tables)) != before:
            path.write_text(after)
