"""Processes wait for slow files as long as it takes, and not at all for a process that stands still or is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import world
from test_checkpoint import toy, try_to_write

from lasp import files
from lasp.data.batches import Shard
from lasp.distributed.comm import Comm
from lasp.distributed.groups import new_group
from lasp.errors import CheckpointError, PeerLostError
from lasp.train import checkpoint
from lasp.train.progress import Progress
from lasp.train.world import World, naming_lost_peers

DEADLINE_S = 1.5


def together(rank: int) -> World:
    control = Comm(new_group(), DEADLINE_S)
    return World(rank, 2, torch.device("cpu"), Shard(), control=control, files=new_group(), timeout_s=DEADLINE_S)


def slowly(work: Callable[..., object], pieces: int) -> Callable[..., object]:
    """`work` after several times the deadline, in which something happens all the time."""

    def slow(*arguments: object, progress: Progress | Callable[[int], None], **options: object) -> object:
        note = progress.note if isinstance(progress, Progress) else progress
        for _ in range(pieces):
            threading.Event().wait(DEADLINE_S / 3)
            note(1)
        return work(*arguments, progress=progress, **options)

    return slow


def test_a_slow_disk_is_waited_for(tmp_path: Path) -> None:
    """Waits at a save, and where a checkpoint is read before a run goes on."""

    def work(rank: int) -> tuple[str | None, object]:
        everyone, model = together(rank), toy()
        original, hashing = checkpoint.seal_file, files.sha256
        if rank == 1:
            slow = slowly(original, 6)
            checkpoint.sealed.seal_file = lambda path, progress: slow(path, progress=progress)  # type: ignore[assignment, return-value]
        problem = try_to_write(tmp_path, 2, *model, among=everyone)
        checkpoint.sealed.seal_file = original
        if rank == 1:
            files.sha256 = slowly(hashing, 3)  # type: ignore[assignment]
        return problem, checkpoint.find(tmp_path, report=pytest.fail, world=everyone).state["step"]

    assert world.run(2, work) == [(None, 2)] * 2


@pytest.mark.parametrize("how", ["stands still", "is stopped"])
def test_whoever_does_not_get_on_ends_the_wait_by_name(tmp_path: Path, how: str) -> None:
    # The control: nothing is wrong here but that rank.
    def work(rank: int) -> str:
        everyone, model = together(rank), toy()
        released = threading.Event()

        def hangs(path: Path, progress: Progress) -> checkpoint.FileSeal:
            progress.enter("writing")
            if how == "is stopped":
                (tmp_path / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                released.wait()
            raise OSError("never reached before the others have ended")

        if rank == 1:
            checkpoint.sealed.seal_file = hangs
        with pytest.raises(PeerLostError) as error, naming_lost_peers(everyone):
            try_to_write(tmp_path / "checkpoints", 2, *model, among=everyone)
        if rank == 0 and how == "is stopped":
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
        return str(error.value)

    first, second = world.run(2, work, deadline_s=60)
    if how == "stands still":
        assert first == second and "the checkpoint of step 2: rank 1 has stood still for" in first
        assert first.endswith(" s, writing")
    else:
        assert "rank 0 lost another process, writing the checkpoint of step 2: rank 1 does not answer" in first


def test_what_the_first_process_says_may_be_long() -> None:
    """Such as the names of many checkpoints, or an error that quotes a long text."""

    def work(rank: int) -> tuple[int, str]:
        everyone = together(rank)
        names = everyone.run_on_first(lambda: {"names": [f"step-{number:08d}" for number in range(5000)]})["names"]

        def fails() -> dict[str, object]:
            raise CheckpointError("x" * 100_000)

        with pytest.raises(CheckpointError) as error:
            everyone.run_on_first(fails)
        return len(names), str(error.value).removeprefix("the first process failed: ")

    assert world.run(2, work) == [(5000, "x" * 100_000)] * 2
