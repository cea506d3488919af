"""The directive `{command} train`: the options of `lasp train`, from the parser that reads them."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from lasp.cli.command_lines import command_line


class Command(SphinxDirective):
    """A command's description, and a definition for each option."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        told = command_line(self.arguments[0].split())
        found: list[nodes.Node] = [nodes.paragraph(text=text) for text in told.description]
        listing = nodes.definition_list(classes=["options"])
        for option in told.options:
            term = nodes.term("", "", nodes.literal(text=option.usage))
            says = nodes.definition("", nodes.paragraph(text=option.text or "(no more to say)"))
            listing += nodes.definition_list_item("", term, says)
        return [*found, listing]


def setup(app: Any) -> dict[str, Any]:
    """Make the directive known."""
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
