"""`lasp completion` offers what the program has, and `lasp --version` says what is installed."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

import lasp
from lasp.cli import main as cli
from lasp.cli.command_lines import COMMAND_LINES, command_line
from lasp.cli.main import COMMANDS


def offered(script: str, *words: str) -> set[str]:
    """Words that bash offers for the last one."""
    asked = f"{script}\nCOMP_WORDS=(lasp {' '.join(repr(word) for word in words)})\n"
    asked += f"COMP_CWORD={len(words)}; _lasp; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-uc", asked], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_offers_commands_options_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert offered(script, "") == {*COMMANDS, "--help", "--version"}
    assert offered(script, "tr") == {"train"}
    assert offered(script, "train", "--data-p") == {"--data-parallel"}
    assert offered(script, "train", "--steps", "3", "--data-parallel", "z") == {"zero1", "zero2", "zero3"}
    assert offered(script, "bench", "") == {"exchange", "train"}
    assert "--longest" in offered(script, "bench", "train", "--")
    assert "--longest" not in offered(script, "bench", "exchange", "--")
    assert offered(script, "generate", "ru") == set()  # a path: the shell's own
    # The name of a command is no option of another, and a script without the table offers nothing.
    assert offered(script.replace("--data-parallel", "--other"), "train", "--data-p") == set()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "-l data-parallel" in script if shell == "fish" else "--data-parallel" in script


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "cmd"]) == 64
    assert "one of bash, zsh, fish" in capsys.readouterr().err


def test_command_lines_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert {line[0] for line in COMMAND_LINES} | {"completion"} == set(COMMANDS)
    for line in COMMAND_LINES:
        assert cli.main([*line, "--help"]) == 0
        printed = set(re.findall(r"(?<![\w`-])--[a-z][\w.-]*\w", re.sub(r"`.*?`", "", capsys.readouterr().out)))
        assert {name for option in command_line(line).options for name in option.names} == printed, line
    options = {name: option for option in command_line(["train"]).options for name in option.names}
    assert options["--steps"].text == "Optimizer steps in all. (default: 700)" and options["--steps"].values == "INT"
    assert options["--model.family"].choices[-1] == "hybrid" and "--no-compile" in options
    assert all(option.text for option in options.values())
    with pytest.raises(ValueError, match="lasp tarin has no options of its own"):
        command_line(["tarin"])


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["lasp"] == lasp.__version__ and said["Python"].startswith(platform.python_version())
    assert said["torch"][0].isdigit() and "triton" in said and "fla-core" in said
    root = Path(__file__).parents[2]
    assert f"\n## {lasp.__version__}\n" in (root / "CHANGELOG.md").read_text()
    assert lasp.__version__ not in (root / "pyproject.toml").read_text()
