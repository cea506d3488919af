"""The pages of the documentation as data: their links, headings and fenced blocks.

A page says how a block is to be tested in a comment on the line above its fence, which readers do not see:

    <!-- not run: why -->                       the block needs what a test does not have
    <!-- tested with: "8" -> "2"; "1b" -> "" -->   it is run with these words in place of those
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^( *)(`{3,})(.*)$")
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
_TESTED_WITH = re.compile(r"<!-- tested with: (.+?) -->")
_FILE = re.compile(r"^# ([\w.-]+\.(?:py|toml))$")


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run; None if it is."""

    @property
    def file(self) -> str | None:
        """The name that its first line gives it: readers save it, and a later block uses it."""
        named = _FILE.match(self.text.split("\n", 1)[0])
        return named[1] if named else None


def pages() -> list[Path]:
    """All pages of the repository that are written by hand, and those that scripts write."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, in order, as they are to be tested. Raises ValueError for one that does not end."""
    found, lines, number = [], page.read_text().split("\n"), 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        first, above = number + 1, lines[number - 1] if number else ""
        number = first
        while number < len(lines) and lines[number].strip() != fence[2]:
            number += 1
        if number == len(lines):
            raise ValueError(f"{page}:{first}: a block begins and does not end")
        text = "\n".join(line.removeprefix(fence[1]) for line in lines[first:number]) + "\n"
        reason = _NOT_RUN.search(above)
        found.append(
            Block(page, first, fence[3].strip(), _substituted(text, above, f"{page}:{first}"), reason and reason[1])  # type: ignore[arg-type]
        )
        number += 1
    return found


def _substituted(text: str, comment: str, where: str) -> str:
    given = _TESTED_WITH.search(comment)
    for pair in re.findall(r'"([^"]*)" -> "([^"]*)"', given[1]) if given else []:
        if pair[0] not in text:
            raise ValueError(f"{where}: {pair[0]!r} is to be replaced and is not there")
        text = text.replace(*pair)
    return text


def without_blocks(page: Path) -> str:
    """The page's prose: what is between fences is left out, and code spans."""
    kept, inside = [], ""
    for line in page.read_text().split("\n"):
        fence = _FENCE.match(line)
        if fence and not inside:
            inside = fence[2]
        elif inside and line.strip() == inside:
            inside = ""
        elif not inside:
            kept.append(re.sub(r"`[^`]*`", "", line))
    return "\n".join(kept)


def links(page: Path) -> list[str]:
    """Targets of links and images that are not addresses."""
    prose = without_blocks(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Names that a link may give in the page: its headings, as Sphinx and code hosts both spell them."""
    found = set()
    for line in page.read_text().split("\n"):
        if heading := re.match(r"#{1,6} (.+)$", line):
            text = re.sub(r"[`*]", "", heading[1]).strip().lower()
            found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text)))
    return found
