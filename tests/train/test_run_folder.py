"""Tests what a run does with its folder: it is taken before it is looked at, and nothing is lost or leads elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import world
from training_runs import small_config

from lasp import files
from lasp.errors import ConfigError
from lasp.train import run_folder, trainer
from lasp.train.logging.metrics import MetricsFile, read_metrics
from lasp.train.run_folder import lock


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a run of four steps, with checkpoints of two and four, and its text."""
    place = tmp_path_factory.mktemp("ended")
    trainer.train(small_config(place, steps=4, save_every=2))
    return place


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_is_locked_before_it_is_looked_at(
    ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run ends, and leaves its last checkpoint, just before the folder is this one's."""
    run = Path(shutil.copytree(ended / "run", tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000004"
    before, aside = content(newest), newest.rename(tmp_path / "aside")

    def comes_late(run_dir: Path) -> object:
        aside.rename(newest)
        return lock(run_dir)

    monkeypatch.setattr(run_folder, "lock", comes_late)
    config = dataclasses.replace(small_config(ended, steps=4, save_every=2), run_dir=run)
    assert trainer.train(config, resume=run).finished_steps == 4
    assert content(newest) == before  # not trained and saved again


def test_a_folder_that_was_begun_meanwhile_is_refused(
    ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(small_config(ended, steps=4), run_dir=tmp_path / "run")

    def meanwhile(run_dir: Path) -> object:
        shutil.copytree(ended / "run", run_dir, dirs_exist_ok=True)
        return lock(run_dir)

    monkeypatch.setattr(run_folder, "lock", meanwhile)
    with pytest.raises(ConfigError, match="is not empty"):
        trainer.train(config, resume=run_folder.AUTO)
    assert content(tmp_path / "run" / "checkpoints") == content(ended / "run" / "checkpoints")


def test_links_in_a_run_folder_lead_nowhere(ended: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in sorted(path.name for path in (ended / "run").iterdir()):
        run = Path(shutil.copytree(ended / "run", tmp_path / f"run-{name}"))
        (run / name).rename(outside / name)
        (run / name).symlink_to(outside / name)
        before = content(outside)
        with pytest.raises(ConfigError, match=f"{name} is a link"):
            trainer.train(dataclasses.replace(small_config(ended, steps=5), run_dir=run), resume=run)
        assert content(outside) == before
    assert len(content(outside)) > 8
    # A second name of one file is a link too, and an archive may hold one.
    run = Path(shutil.copytree(ended / "run", tmp_path / "hard"))
    (run / "lock").unlink()
    os.link(outside / "sample.txt", run / "lock")
    with pytest.raises(ConfigError, match="not a file that lasp made"):
        lock(run)
    assert content(outside) == before


def test_files_take_the_place_of_links(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "path"
    target.write_text("kept")
    path.symlink_to(target)
    files.write(path, "new")
    assert (target.read_text(), path.read_text(), path.is_symlink()) == ("kept", "new", False)
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path)
    with pytest.raises(OSError, match="is a link"):
        files.make_folder(folder)
    with pytest.raises(ValueError, match="longer than 3 bytes"):
        files.read(target, 3)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "path", "target"]


def test_damaged_lines_of_metrics_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3)]
    damaged = [b"5", b"{}", b'{"st\xffep": 2}', b'{"step": "2"}', b"[" * 100_000, b"\0\0\0"]
    before = b"\n".join([good[0], *damaged, *good[1:], b'{"step": 4, "lo'])
    path.write_bytes(before)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    metrics = MetricsFile(path, finished_steps=2)
    assert metrics.num_damaged == len(damaged)
    metrics.write(step=3, loss=2.0)
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_full_disk_delays_metrics(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes past a limit, in the middle of a line."""

    def full(_rank: int) -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        metrics = MetricsFile(tmp_path / "metrics.jsonl", finished_steps=0)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        refused = 0
        for step in range(100):
            try:
                metrics.write(step=step)
            except OSError:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert all(line.endswith(b"}") for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines())
        metrics.close()
        return refused

    assert world.run(1, full)[0] > 10
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(100))


@pytest.mark.parametrize("output", ["full", "closed", "unread"])
def test_a_run_does_not_depend_on_who_listens(tmp_path: Path, output: str) -> None:
    """Nor on its figures being written: here they cannot be, and the checkpoint is."""
    config = small_config(tmp_path, steps=3, log_every=1)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, timeout_s=2))

    def train(_rank: int) -> int:
        import sys

        if output == "full":
            target = os.open("/dev/full", os.O_WRONLY)
        else:
            read_end, target = os.pipe()
            if output == "closed":
                os.close(read_end)
            else:  # a pipe that is full, and that nobody reads
                os.set_blocking(target, False)
                while True:
                    try:
                        os.write(target, b"x" * 512)
                    except BlockingIOError:
                        break
                os.set_blocking(target, True)
        os.dup2(target, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - of a process that ends here
        original = MetricsFile.write

        def refuses(self: MetricsFile, **values: object) -> None:
            if values["step"] == 2:
                raise OSError(28, "No space left on device")
            original(self, **values)

        MetricsFile.write = refuses  # type: ignore[method-assign]
        return trainer.train(config).finished_steps

    assert world.run(1, train, deadline_s=60) == [3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").exists()
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 3]
