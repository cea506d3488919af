"""A run that is continued has the losses of a run that was never interrupted."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import world
from training_runs import small_config

from lasp.train import checkpoint, loop, shards, step
from lasp.train.config import TrainConfig
from lasp.train.errors import CheckpointError, ConfigError
from lasp.train.metrics import read_metrics


def train(config: TrainConfig, num_processes: int = 1, resume: Path | None = None) -> list[dict]:
    """Run; the metrics of its steps."""
    world.run(num_processes, lambda _rank: loop.train(config, resume=resume) and None)
    assert config.run_dir is not None
    return [line for line in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in line]


def key(lines: list[dict]) -> list[tuple]:
    """What must be equal, bit for bit."""
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.mark.parametrize(("dp", "sp"), [(1, 1), (1, 2), (2, 2)])
def test_resumed_equals_uninterrupted(tmp_path: Path, dp: int, sp: int) -> None:
    config = small_config(tmp_path, dp=dp, sp=sp, accumulation=2)
    whole = train(config, dp * sp)
    assert len(whole) == 12

    # The same run, killed by an exception after step 9; its last checkpoint is of step 6.
    halves = dataclasses.replace(config, run_dir=tmp_path / "halves", save_every=3, keep_checkpoints=1)

    def killed(_rank: int) -> None:
        original = step.Stepper.step

        def until_nine(self: step.Stepper, number: int, **options: object) -> step.StepResult:
            if number == 8:
                raise KeyError("killed")
            return original(self, number, **options)  # type: ignore[arg-type]

        step.Stepper.step = until_nine  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyError):
            loop.train(halves)

    world.run(dp * sp, killed)
    assert halves.run_dir is not None
    assert checkpoint.find(halves.run_dir, report=pytest.fail).state["step"] == 6
    assert key(train(halves, dp * sp, resume=halves.run_dir)) == key(whole)


def test_what_changes_the_losses_of_a_continued_run_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, steps=1, save_every=1)
    train(config)

    def resume(option: str) -> None:
        data = dataclasses.replace(config.data, **{option: True})
        train(dataclasses.replace(config, steps=2, data=data, seed=1), resume=config.run_dir)

    with pytest.raises(world.WorldError, match=r"--data\.carry goes on .* written without it"):
        resume("carry")
    capfd.readouterr()
    resume("packed")
    lines = [line for line in capfd.readouterr().out.splitlines() if "losses will differ" in line]
    assert sorted(line.split("differ: ")[1].split()[0].rstrip(":") for line in lines) == ["packed", "seed"]


def test_a_run_continues_on_another_layout(tmp_path: Path) -> None:
    config = small_config(tmp_path, sp=1)
    whole = train(config)
    first = dataclasses.replace(config, run_dir=tmp_path / "moved", save_every=6)
    assert first.run_dir is not None
    train(first)
    (first.run_dir / "checkpoints" / "step-00000012").rename(tmp_path / "aside")
    moved = dataclasses.replace(first, parallel=dataclasses.replace(first.parallel, sp=2, dp=2))
    lines = train(moved, 4, resume=first.run_dir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line, expected in zip(lines, whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_forgetting_the_optimizer_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, sp=1, save_every=6)
    whole = train(config)
    assert config.run_dir is not None
    (config.run_dir / "checkpoints" / "step-00000012").rename(tmp_path / "aside")
    original = shards.load
    without = lambda *given, **options: original(*given, **{**options, "optimizer": None})  # noqa: E731
    monkeypatch.setattr(shards, "load", without)
    again = train(config, resume=config.run_dir)
    assert key(again)[:7] == key(whole)[:7]  # up to the first loss after step 6
    assert again[-1]["loss"] != pytest.approx(whole[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_every_process_at_one_step(tmp_path: Path, number: signal.Signals) -> None:
    config = small_config(tmp_path, sp=2, steps=1000)

    def interrupted(rank: int) -> tuple[bool, int]:
        original = step.Stepper.step

        def with_signal(self: step.Stepper, index: int, **options: object) -> step.StepResult:
            if rank == 1 and index == 4:  # one process is told, both must stop
                os.kill(os.getpid(), number)
                if number == signal.SIGHUP:  # a terminal that is closed sends it, and its shell too
                    os.kill(os.getpid(), number)
            return original(self, index, **options)  # type: ignore[arg-type]

        step.Stepper.step = with_signal  # type: ignore[method-assign,assignment]
        result = loop.train(config)
        return result.stopped, result.finished_steps

    assert world.run(2, interrupted) == [(True, 5), (True, 5)]
    assert config.run_dir is not None
    assert checkpoint.find(config.run_dir, report=pytest.fail).state["step"] == 5


def test_another_model_or_another_text_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, sp=1, steps=2)
    train(config)
    assert config.run_dir is not None
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, overrides={"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"num_layers: 4 -> 3|num_layers: 2 -> 3"):
        loop.train(wider, resume=config.run_dir)
    with pytest.raises(ConfigError, match=r"is not empty: continue it with --resume"):
        loop.train(config)
    (tmp_path / "text" / "part0" / "text0.txt").write_text("something else " * 100)
    with pytest.raises(loop.DataError, match="the text has changed"):
        loop.train(config, resume=config.run_dir)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, sp=1, save_every=6)
    whole = train(config)
    assert config.run_dir is not None
    older = config.run_dir / "checkpoints" / "step-00000006"
    with pytest.raises(ConfigError, match="is not the newest checkpoint of its run"):
        loop.train(config, resume=older)
    (model,) = (config.run_dir / "checkpoints" / "step-00000012").glob("*.safetensors")
    model.write_bytes(model.read_bytes()[:-8])
    assert key(train(config, resume=config.run_dir)) == key(whole)
    said = capfd.readouterr().out
    assert "skipped a damaged checkpoint" in said and "falling back to" in said
