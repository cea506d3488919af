"""Several processes of one program on this machine, without torchrun: started, watched and ended together.

Promises: the first process to fail ends the run and its own error text is shown; no process outlives this one,
however this one ends; Ctrl-C is passed on once, so that the processes can save and leave together.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lasp.distributed.process_group import RENDEZVOUS, stay_on_loopback
from lasp.distributed.signals import IMPATIENT, end_with_parent, stop_signals
from lasp.errors import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE, PeerLostError
from lasp.terminal import say

# How long the others may take to notice a dead process and end by themselves, and to obey SIGTERM.
_GRACE_S = 10.0
LIFELINE = "LASP_LIFELINE"
_MOST_ERROR_BYTES = 1 << 20
_PEER_LOST = PeerLostError.exit_code


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `lasp ARGUMENTS` in `num_processes` processes; return the exit code of the first that failed, or 0.

    The processes find the variables that torchrun sets. They meet through a file in memory, so no port can be taken or
    reached from outside, no full disk is in the way, and nothing is left wherever this process is killed.
    """
    meeting = _meeting_place()
    errors: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(num_processes)]  # noqa: SIM115 - until the end
    # The write end is held here alone. When this process dies, by whatever means, the others read the end of it.
    read_end, write_end = os.pipe()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_on_signals(workers) as signals:
            for rank in range(num_processes):
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "lasp", *arguments],
                        env=_environment(rank, num_processes, meeting, read_end),
                        stdin=subprocess.DEVNULL,
                        stderr=errors[rank],
                        pass_fds=[read_end, *meeting.descriptors],
                        start_new_session=True,  # the terminal's Ctrl-C reaches only this process
                    )
                )
            failed = _wait(workers, signals)
        first = _cause(failed, workers)
        _show_errors(errors, first, [worker.returncode for worker in workers])
        return 0 if first is None else _exit_code(workers[first].returncode)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        for descriptor in (read_end, write_end, *meeting.descriptors):
            os.close(descriptor)
        for file in errors:
            file.close()
        if meeting.folder is not None:
            shutil.rmtree(meeting.folder, ignore_errors=True)


class _Meeting(NamedTuple):
    """The file through which the processes find each other: its path there, what they inherit, what to remove."""

    path: Path
    descriptors: list[int]
    folder: Path | None


def _meeting_place() -> _Meeting:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("lasp-meeting")
        return _Meeting(Path(f"/proc/self/fd/{descriptor}"), [descriptor], None)
    folder = Path(tempfile.mkdtemp(prefix="lasp-"))
    return _Meeting(folder / "meet", [], folder)


def _wait(workers: list[subprocess.Popen[bytes]], signals: list[int]) -> list[int]:
    """Wait until all have ended; return the ranks that failed by themselves, in the order it was seen.

    A failure, or a second signal from the user, gives the others a last while.
    """
    failed: list[int] = []
    deadline = float("inf")
    running = True
    while running:
        running = any(worker.poll() is None for worker in workers)
        failed += [rank for rank, worker in enumerate(workers) if worker.poll() and rank not in failed]
        if (failed or len(signals) > 1) and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                for worker in workers:
                    worker.wait(_GRACE_S)
            break
        time.sleep(0.02)
    return failed


def _cause(failed: list[int], workers: list[subprocess.Popen[bytes]]) -> int | None:
    """The process to blame: the first to fail of those that did not fail for want of another."""
    own_fault = [rank for rank in failed if workers[rank].returncode != _PEER_LOST]
    return next(iter(own_fault + failed), None)


@contextlib.contextmanager
def _passing_on_signals(workers: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand what asks to stop to the workers; the list yielded grows by each that is IMPATIENT."""
    signals: list[int] = []

    def pass_on(number: int) -> None:
        if number in IMPATIENT:
            signals.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with stop_signals(pass_on, once=False):
        yield signals


def _environment(rank: int, num_processes: int, meeting: _Meeting, lifeline: int) -> dict[str, str]:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = dict(os.environ)
    # More threads than cores make processes that wait for each other many times slower.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_processes)))
    stay_on_loopback(environment)
    return environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        RENDEZVOUS: meeting.path.as_uri(),
        LIFELINE: str(lifeline),
    }


def _show_errors(errors: list[IO[bytes]], first: int | None, codes: list[int]) -> None:
    """The error text of the process that failed first; of a run without failure, the first process's warnings."""
    rank = first if first is not None else 0
    errors[rank].seek(0)
    text = errors[rank].read(_MOST_ERROR_BYTES).decode(errors="replace").strip()
    if text:
        say(text, error=True)
    if first is None or codes[first] in (STOPPED_EXIT_CODE, INTERRUPTED_EXIT_CODE):
        return  # as the user wished, and the run has said so
    if text and all(code == codes[first] for code in codes):
        return  # all ended alike, and the text says why
    code = codes[first]
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    say(f"lasp: process {first} of {len(codes)} {how}; the run has ended", error=True)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def follow() -> None:
    """Leave at once when the launcher is gone; called in a process that `launch` started."""
    end_with_parent()
    lifeline = int(os.environ.pop(LIFELINE))

    def watch() -> None:
        os.read(lifeline, 1)  # returns when the last write end is closed
        os._exit(_PEER_LOST)

    threading.Thread(target=watch, daemon=True).start()
