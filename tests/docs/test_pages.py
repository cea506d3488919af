"""What the pages promise: links that lead somewhere, blocks that can be read, lengths, and that no page is lost."""

from __future__ import annotations

import ast
import importlib
import pydoc
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from page_blocks import DOCS, ROOT, anchors, blocks, links, pages

import lasp

PAGES = pages()
# What a page may name: files that git knows of, and those of a folder that a page has its readers make.
FILES = [
    f"/{name}"
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
]
LONGEST = {"README.md": 150, "quickstart": 60, "guide": 150}


def missing(program: ast.Module, page: str) -> list[str]:
    """What a program takes from lasp that neither lasp nor a file the page shows has; blocks that are not run must
    have the names right too."""
    found = []
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lasp":
            if f"`src/{node.module.replace('.', '/')}.py`:\n" in page:
                continue
            module = importlib.import_module(node.module)
            found += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lasp":
            found += [] if hasattr(lasp, node.attr) else [f"lasp.{node.attr}"]
    return found


def undocumented(reference: str) -> list[str]:
    """Names that a page of the reference is to show and that are not there."""
    module, shown, found = "", "", []
    for kind, value in re.findall(r"(currentmodule::|auto\w+::|:members:) +(.+)", reference):
        if kind == "currentmodule::":
            module = f"{value}."
        names = value.split(", ") if kind == ":members:" else [value]
        if kind.startswith("auto"):
            shown = names[0] if names[0].startswith("lasp.") else f"{module}{names[0]}"
            names = [shown]
        elif kind == ":members:":
            names = [f"{shown}.{name}" for name in names]
        else:
            names = []
        found += [name for name in names if pydoc.locate(name) is None and not is_attribute(name)]
    return found


def is_attribute(name: str) -> bool:
    """Whether a class has it, though not before it is made."""
    owner, _, attribute = name.rpartition(".")
    return attribute in getattr(pydoc.locate(owner), "__annotations__", {})


def absent(packages: Iterable[str], reference: str) -> list[str]:
    """Public classes and functions of packages that no directive of the reference shows."""
    shown = set(re.findall(r"[\w]+", " ".join(re.findall(r"(?:auto\w+::|:members:) +(.+)", reference))))
    found = []
    for package in packages:
        module = importlib.import_module(package)
        whole = re.search(rf"automodule:: {re.escape(package)}\n +:members:\n", reference)
        public = [] if whole else [name for name in module.__all__ if callable(getattr(module, name))]
        found += [f"{package}.{name}" for name in public if name not in shown]
    return found


def unsaid(questions: str) -> list[str]:
    """Messages that questions quote in bold and that no code of src says; capitals that stand alone are for values."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    said = re.sub(r"\{[^{}]*\}", "", re.sub(r'"\s*\n\s*[rf]*"', "", source))
    found = []
    for line in re.findall(r"^\*\*.+$", questions, re.MULTILINE):
        for message in re.findall(r"\*\*(.+?)\*\*", line):
            parts = [part.strip(" '") for part in re.split(r"\.\.\.|\b[A-Z]\b(?![^\[]*\])", message)]
            found += [part for part in parts if len(part) > 2 and part not in said]
    return found


def problems(page: Path) -> list[str]:
    """What is wrong with a page, by looking at it."""
    found = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            found.append(f"{target}: there is no such file")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            found.append(f"{target}: there is no such heading")
    # A name with a colon before a block is that of a file which the block shows.
    for name in re.findall(r"`([\w./]+\.(?:py|toml|sbatch|yaml))`(?!:\n+```)", page.read_text()):
        if not any(file.endswith(f"/{name}") for file in FILES):
            found.append(f"{name}: there is no such file")
    for block in blocks(page):
        if block.language == "python":
            try:
                found += [
                    f"line {block.line}: {name} is not there"
                    for name in missing(ast.parse(block.text), page.read_text())
                ]
            except SyntaxError as error:
                found.append(f"line {block.line}: {error}")
        elif block.language == "{eval-rst}":
            found += [f"line {block.line}: {name} is not there" for name in undocumented(block.text)]
        elif block.language == "bash":
            for command in re.sub(r"\\\n", " ", block.text).splitlines():
                try:
                    shlex.split(command, comments=True)
                except ValueError as error:
                    found.append(f"line {block.line}: {command}: {error}")
    name = page.name if page.parent == ROOT else page.parent.name
    lines = page.read_text().count("\n")
    if lines > LONGEST.get(name, lines):
        found.append(f"{lines} lines, at most {LONGEST[name]}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_holds_together(page: Path) -> None:
    assert problems(page) == []


def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "guide" / "page.md"
    page.parent.mkdir()
    (tmp_path / "other.md").write_text("# A `heading`, and more\n")
    good = "[a](../other.md#a-heading-and-more) [b](https://example.org/no) `[c](no.md)`\n```python\nx = 1\n```\n"
    page.write_text(good)
    assert problems(page) == []
    page.write_text(
        good
        + "[d](no.md) [e](../other.md#no) `no/file.py` `test_pages.py`\n"
        + "```python\nlasp.nothing()\n```\n```bash\nlasp 'x\n```\n"
        + "```{eval-rst}\n.. currentmodule:: lasp\n.. autofunction:: delta_rule\n.. autofunction:: no\n"
        + ".. autoclass:: SequenceParallel\n   :members: shard, nothing\n```\n"
        + "\n" * 150
    )
    assert [problem.split(":")[0] for problem in problems(page)] == [
        "no.md", "../other.md#no", "no/file.py", "line 6", "line 9", "line 12", "line 12", "168 lines, at most 150",
    ]  # fmt: skip


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    listed = {line for tree in re.findall(r"```\{toctree\}(.+?)```", index, re.DOTALL) for line in tree.split("\n")}
    written = {str(page.relative_to(DOCS).with_suffix("")) for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    assert written - listed == {"index"}


def test_every_public_name_is_in_the_reference() -> None:
    packages = [f"lasp{name}" for name in ("", ".algebra", ".exchange", ".generate", ".hf", ".layers", ".models")]
    reference = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    assert absent(packages, reference) == []
    shorter = reference.replace(".. autofunction:: delta_rule\n", "").replace("lasp.layers\n", "lasp.no\n")
    assert {"lasp.delta_rule", "lasp.layers.DeltaNet"} <= set(absent(packages, shorter))


def test_questions_quote_what_is_said() -> None:
    questions = (DOCS / "faq.md").read_text()
    messages = re.split(r"^(?=## )", questions, flags=re.MULTILINE)
    quoting = "".join(part for part in messages if part.startswith(("## Messages", "## Models of transformers")))
    assert unsaid(quoting) == []
    assert unsaid(quoting + "**the text has N tokens, and so on**, **no such message**\n") == [
        "tokens, and so on", "no such message",
    ]  # fmt: skip


def test_every_page_that_code_names_is_there() -> None:
    named = {
        page
        for name in FILES
        if name.startswith(("/src/", "/benchmarks/", "/examples/", "/configs/")) and name.endswith((".py", ".toml"))
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", (ROOT / name[1:]).read_text())
    }
    assert "docs/design/kernels.md" in named
    assert {page for page in named if not (ROOT / page).exists()} == set()
