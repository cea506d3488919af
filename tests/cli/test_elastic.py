"""A job that torchrun restarts goes on by itself, and ends with the losses of one that nothing disturbed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from pathlib import Path

import forked
import pytest
import world
from test_launch import command, linux, wait_until, whole_end, workers
from world import torchrun

from lasp.cli import train as train_command
from lasp.errors import CheckpointError, ConfigError
from lasp.train import trainer
from lasp.train.config import AUTO
from lasp.train.logging.metrics import read_metrics

STEPS = 40


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


@linux
@pytest.mark.parametrize(
    "hosts", [pytest.param(1, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.exhaustive)]
)
def test_a_killed_process_costs_only_time(tmp_path: Path, hosts: int) -> None:
    """hosts: as many torchruns, one of two processes or two of one; to the processes they are as many machines."""
    arguments = command(tmp_path, "--steps", str(STEPS), "--save-every", "5", "--resume", "auto")
    start = [*torchrun(2 // hosts), "--master-addr", "127.0.0.1", "--nnodes", str(hosts), "--max-restarts", "2"]
    jobs = [
        forked.Popen(
            [*start, "--node-rank", str(host), "-m", "lasp", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    job = jobs[0]
    try:
        wait_until(lambda: len(losses(tmp_path / "run")) >= 7, job)
        os.kill(workers(jobs[-1].pid)[2 // hosts - 1], signal.SIGKILL)  # of rank 1
        out, error = job.communicate(timeout=90)
        assert [each.wait(30) for each in jobs] == [0] * hosts, error
    finally:
        for each in jobs:
            each.kill()
    whole_end(tmp_path / "run", out)
    assert out.count("Training transnormer-tiny") == 2 and out.count("resumed") == 1 and "after step" in out

    whole = train_command.arguments_of(arguments[1:]).settings
    whole = dataclasses.replace(whole, run_dir=tmp_path / "whole")
    world.run(2, lambda _rank: trainer.train(whole) and None)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_auto_begins_where_there_is_nothing_good_to_go_on_from(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--steps", "2", "--sp", "1", "--resume", "auto")[1:]
    config = train_command.arguments_of(arguments).settings
    assert train_command.arguments_of(arguments).resume == AUTO
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')  # of a try that saved nothing
    trainer.train(config, resume=AUTO)
    assert [step for step, _ in losses(run_dir)] == [1, 2] and losses(run_dir)[0][1] != 9.0
    # Damage is not taken for a beginning.
    (run_dir / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is usable"):
        trainer.train(config, resume=AUTO)
    with pytest.raises(ConfigError, match="name it with --run-dir"):
        train_command.arguments_of(["--resume", "auto"])
