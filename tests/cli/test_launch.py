"""`lasp train` with processes of its own, for real: they finish, fail, stop and die together.

Most are forked from this process. That new interpreters do the same is seen of one run, by `make exhaustive` of all.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from training_runs import SMALL, write_text
from world import torchrun

from lasp.errors import ConfigError
from lasp.train import checkpoint
from lasp.train.logging.metrics import read_metrics
from lasp.train.run_folder import lock

LASP = [sys.executable, "-m", "lasp"]
FOREVER = ["--steps", "1000000"]


def command(folder: Path, *options: str) -> list[str]:
    """A small training run, writing to `folder`/run."""
    text = folder / "text"
    if not text.exists():
        write_text(text)
    overrides = [word for key, value in SMALL.items() for word in (key, str(value))]
    fixed = ["--data.path", str(text), "--data.cache", str(folder / "cache"), "--run-dir", str(folder / "run")]
    small = ["--seq-len", "32", "--eval-sequences", "4", "--sample.num-tokens", "4", "--model.overrides", *overrides]
    return ["train", *fixed, *options, *small]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An endless run over two processes that has made its first steps."""
    process = forked.Popen(
        [*LASP, *command(tmp_path, *FOREVER)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    wait_until(lambda: len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 3, process)
    yield process
    process.kill()
    process.communicate()


def wait_until(condition, process: subprocess.Popen[str] | None = None, deadline_s: float = 60) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + deadline_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


def workers(parent: int) -> dict[int, int]:
    """Rank -> process id of the processes that `parent` has started, in this order."""
    return dict(enumerate(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal as the kernel gives them, at which a process waits to be reached."""
    folder = Path(f"/proc/{pid}/fd")
    sockets = {os.readlink(link) for link in folder.iterdir() if link.is_symlink()}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local.split(":")[0])
    return addresses


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")


@linux
def test_ctrl_c_saves_and_ends_everything(running: subprocess.Popen[str], tmp_path: Path) -> None:
    started = workers(running.pid)
    # Only this machine can reach the run: 127.0.0.1, on whatever ports.
    assert {address for pid in (running.pid, *started.values()) for address in listening(pid)} == {"0100007F"}
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=30)
    assert running.returncode == 75, error
    assert "ended with exit code" not in error  # what the user wished is no failure
    assert "Stopped; saved" in out and f"lasp train --resume {tmp_path / 'run'}" in out
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert checkpoint.find(tmp_path / "run", report=pytest.fail).state["step"] == last
    assert sorted(started) == [0, 1] and not any(alive(pid) for pid in started.values())
    assert not list(tmp_path.glob("lasp-*"))  # the meeting place is gone too


@linux
def test_a_killed_process_ends_the_run_by_name(running: subprocess.Popen[str]) -> None:
    started = workers(running.pid)
    os.kill(started[1], signal.SIGKILL)
    _, error = running.communicate(timeout=40)
    assert running.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by signal SIGKILL" in error
    assert not any(alive(pid) for pid in started.values())


@linux
def test_no_process_outlives_the_launcher(running: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"another run is writing to .*run \(host .*, process {workers(running.pid)[0]}\)"
    ):
        lock(tmp_path / "run")
    started = workers(running.pid)
    assert len(started) == 2 and all(alive(pid) for pid in started.values())
    os.kill(started[0], signal.SIGSTOP)  # one that cannot notice anything
    running.kill()
    wait_until(lambda: not any(alive(pid) for pid in started.values()), deadline_s=15)
    assert not list(tmp_path.glob("lasp-*"))

    def free() -> bool:
        # A process's first thread may be seen to have ended before the others, which still hold its files.
        with contextlib.suppress(ConfigError):
            lock(tmp_path / "run").close()
            return True
        return False

    wait_until(free, deadline_s=15)  # nothing is left to be cleared away


def test_the_failing_process_says_why_once(tmp_path: Path) -> None:
    """Found out by the first process alone, after all have met."""
    arguments = command(tmp_path, "--steps", "2", "--data.suffixes", ".rst")
    done = forked.run([*LASP, *arguments])
    assert done.returncode == 65
    assert done.stderr.count("no file below") == 1 and "Traceback" not in done.stderr


def whole_end(run: Path, said: str) -> str:
    """Check that a run has said and left what a user gets; the text it generated."""
    said = said[said.index("Generated text") :]
    assert "bits per byte on 128 tokens" in said and "byte 3-gram" in said and "Finished" in said
    sample = (run / "sample.txt").read_text()
    (prompt,) = re.findall(r"\(after '(.+)', the first words of the held-out text\)", said)
    assert any(path.read_text().startswith(prompt) for path in (run.parent / "text").rglob("*.txt"))
    assert sample.startswith(prompt) and len(sample) > len(prompt) and (run / "curve.png").stat().st_size > 1000
    return sample


LAYOUTS = {
    "ddp": ["--dp", "2", "--sp", "1"],
    "zero1": ["--dp", "2", "--sp", "1", "--data-parallel", "zero1"],
    "zero2": ["--dp", "2", "--sp", "1", "--data-parallel", "zero2"],
    "zero3": ["--dp", "2", "--sp", "1", "--data-parallel", "zero3", "--precision", "bf16"],
    "sp": [],
    "hybrid": ["--dp", "4", "--sp", "1", "--data-parallel", "zero3", "--dp-replicate", "2"],
    "dp-sp": ["--dp", "2", "--sp", "2", "--data-parallel", "zero2"],
}
# Under torchrun too, which must not matter.
TORCHRUN = ("ddp", "zero1")


@pytest.mark.parametrize(
    ("layout", "new"),
    [
        pytest.param(layout, False, marks=() if layout in ("zero3", "sp", "dp-sp") else pytest.mark.ci)
        for layout in LAYOUTS
    ]
    + [
        # What `lasp train` is.
        pytest.param(layout, True, marks=pytest.mark.ci if layout == "sp" else pytest.mark.exhaustive)
        for layout in LAYOUTS
    ],
)
def test_every_layout_ends_with_score_sample_and_curve(tmp_path: Path, layout: str, new: bool) -> None:
    ends = []
    for number, program in enumerate([LASP] + [[*torchrun(), "-m", "lasp"]] * (layout in TORCHRUN)):
        run = tmp_path / f"run{number}"
        arguments = command(tmp_path, "--steps", "2", *LAYOUTS[layout], "--run-dir", str(run))
        done = forked.run([*program, *arguments], new=new)
        assert done.returncode == 0, done.stderr
        sample = whole_end(run, done.stdout)
        lines = read_metrics(run / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
        assert [line["validation_tokens"] for line in lines if "validation_tokens" in line] == [128]
        ends.append(([line.get("loss") for line in lines], sample))
    assert ends[0] == ends[-1]
