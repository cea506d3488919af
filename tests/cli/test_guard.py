"""One guard around every command, its imports included: a user's fault is one message, a fault of ours says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.cli.main import guarded
from lasp.errors import DataError, PeerLostError
from lasp.train.logging.program import lasp_command

LASP = [sys.executable, "-m", "lasp"]


def fails(error: BaseException) -> int:
    def command() -> int:
        raise error

    return guarded(command)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("no text"), 65, "lasp: no text"),
        (PeerLostError("rank 1 is gone"), 71, "lasp: rank 1 is gone"),
        (PermissionError(13, "Permission denied", "a.html"), 74, "lasp: a.html: Permission denied"),
        (OSError(28, "No space left on device"), 74, "No space left on device"),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), 64, "pyarrow is not installed"),
        (KeyboardInterrupt(), 130, "lasp: interrupted"),
        (MemoryError(), 1, "lasp: out of memory"),
        (SystemExit(2), 64, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_what_a_user_can_cause_is_one_message(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(error) == code
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == bool(said) and "Traceback" not in text
    # Where it came from can be had.
    monkeypatch.setenv("LASP_TRACEBACK", "1")
    assert fails(error) == code
    assert ("Traceback" in capsys.readouterr().err) == bool(said)


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), ConnectionResetError(104, "reset")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(error) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "in command" in text and "this is a fault of lasp" in text


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_while_pytorch_is_loaded() -> None:
    """Sent when the first of PyTorch's modules has been loaded, as the interpreter itself reports."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "lasp", "plan"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "| torch." in " ".join(line.split()) or "|   torch." in line:
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert "lasp: interrupted" in error and "Traceback" not in error


def test_a_reader_that_has_gone_is_no_fault() -> None:
    process = subprocess.Popen([*LASP, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 74 and error == "lasp: nobody reads the output any more\n"


def test_what_a_terminal_cannot_show_is_shown_by_its_number() -> None:
    script = "import sys; sys.argv[0] = 'lasp'; "  # which loads no PyTorch
    script += "from lasp.cli.main import guarded; guarded(lambda: print('caf\\u00e9') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii", **_path()}
    )
    assert done.stdout == "caf\\xe9\n" and done.returncode == 0, done.stderr


def test_printed_commands_work_as_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries a shell that finds this program by its name, and one that finds another, or none."""
    beside = Path(sys.executable).parent
    other = tmp_path / "lasp"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    for path in (f"{beside}:{os.environ['PATH']}", f"{tmp_path}:{os.environ['PATH']}"):
        monkeypatch.setenv("PATH", path)
        line = lasp_command("verify", "a folder/of mine", "--help")
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.returncode == 0 and "Read every checkpoint" in done.stdout, (line, done.stderr)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))  # without a command beside it
    other.rename(tmp_path / "lasp-of-others")
    assert lasp_command("verify", "a b").endswith("python3 -m lasp verify 'a b'")


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}
