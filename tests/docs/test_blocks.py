"""Every fenced block of the README, the quickstarts and the guide is run, in order, in a folder of its page's own.

By bash as it stands, with programs that have started already (`warm_shell`). `make test` runs the quickstarts,
`make exhaustive` all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_blocks import DOCS, ROOT, Block, blocks
from training_runs import write_text
from warm_shell import WarmShell, shortened

# Of the quickstarts two are mostly `lasp plan`, which has tests of its own, and one loads transformers for seconds.
_LATER = dict.fromkeys(("million-tokens", "plan", "transformers"), pytest.mark.exhaustive)
# Three train for longest, and one measures.
_LATER |= dict.fromkeys(("resume", "train", "generate", "exchange"), pytest.mark.ci)
QUICKSTARTS = sorted((DOCS / "quickstart").glob("*.md"))
OTHERS = [ROOT / "README.md", DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md"))]


@pytest.fixture(scope="module")
def shell() -> Iterator[WarmShell]:
    with WarmShell() as warm:
        yield warm


def prepare(folder: Path) -> None:
    """Makes what the guide's commands speak of: texts, records, the repository's own files."""
    write_text(folder / "my" / "texts", num_files=6)
    (folder / "my" / "held-out.txt").write_text("a text that is held out. " * 200)
    (folder / "book.txt").write_text("It was a text of one file, which is a book. " * 400)
    (folder / "rows.jsonl").write_text('{"text": "a record of a few words"}\n' * 400 + "no record\n")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, folder / name)


def run(page: Path, folder: Path, shell: WarmShell) -> None:
    """Run a page's blocks. Raises AssertionError with the block that fails and what it printed.

    A block that names a file is written there. Other Python blocks of a page go on where the one before ended.
    """
    program = ""
    for block in blocks(page):
        if block.reason is not None or block.language not in ("python", "bash", "toml"):
            continue
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            program += block.text
            (folder / "page.py").write_text(program)
            _check(block, shell.run("python page.py", folder))
        elif block.language == "bash":
            _check(block, shell.run(block.text, folder))


def _check(block: Block, done) -> None:  # type: ignore[no-untyped-def]
    where = f"{block.page.name}, line {block.line}"
    assert done.returncode == 0, f"{where} ended with exit code {done.returncode}\n{block.text}\n{done.stdout[-3000:]}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=_LATER.get(page.stem, ()), id=page.stem) for page in QUICKSTARTS],
)
def test_a_quickstart_works_from_an_empty_folder(page: Path, tmp_path: Path, shell: WarmShell) -> None:
    write_text(tmp_path / "my" / "texts", num_files=6)  # instead of the standard library's source, which is large
    run(page, tmp_path, shell)


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_work(page: Path, tmp_path: Path, shell: WarmShell) -> None:
    prepare(tmp_path)
    run(page, tmp_path, shell)


def test_a_block_that_fails_is_seen(tmp_path: Path, shell: WarmShell) -> None:
    page = tmp_path / "page.md"
    good = "```python\n# one.py\nimport lasp\n```\n```bash\ntorchrun --nproc-per-node 2 one.py && lasp --version\n```\n"
    page.write_text(good)
    run(page, tmp_path, shell)
    for bad in (
        "```python\nimport lasp\nlasp.nothing\n```\n",
        "```bash\nlasp train --no-such-option 3 | cat\necho done\n```\n",
        "```bash\ntorchrun --nproc-per-node 2 none.py\n```\n",
    ):
        page.write_text(good + bad)
        with pytest.raises(AssertionError, match=r"page\.md, line 8"):
            run(page, tmp_path, shell)
    page.write_text(good + "<!-- not run: it cannot -->\n" + bad)
    run(page, tmp_path, shell)


def test_training_is_shortened_and_nothing_else() -> None:
    assert shortened(["plan", "--gpus", "8"]) == ["plan", "--gpus", "8"]
    words = shortened(["train", "--resume", "runs/a", "--steps", "140", "--sp", "1"])
    assert words[:7] == ["train", "--resume", "runs/a", "--steps", "7", "--sp", "1"] and "d_model" not in words
    assert "my/texts" in shortened(["train"]) and "d_model" in shortened(["train"])
