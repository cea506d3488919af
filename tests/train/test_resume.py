"""A run that is continued has the losses of a run that was never interrupted."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import world
from training_runs import small_config

from lasp.errors import CheckpointError, ConfigError, DataError
from lasp.train import checkpoint, step, trainer
from lasp.train.checkpoint import shards
from lasp.train.config import OptimizerOptions, TrainConfig
from lasp.train.logging.metrics import read_metrics
from lasp.train.optimizer import learning_rate


def train(config: TrainConfig, num_processes: int = 1, resume: Path | None = None) -> list[dict]:
    """Run; the metrics of its steps."""
    world.run(num_processes, lambda _rank: trainer.train(config, resume=resume) and None)
    assert config.run_dir is not None
    return [line for line in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in line]


def key(lines: list[dict]) -> list[tuple]:
    """Numbers that must be equal, bit for bit."""
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.mark.parametrize(
    ("dp", "sp"),
    [
        pytest.param(1, 1, marks=pytest.mark.exhaustive),
        (1, 2),
        pytest.param(2, 2, marks=pytest.mark.ci),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, dp: int, sp: int) -> None:
    config = small_config(tmp_path, dp=dp, sp=sp, accumulation=2, steps=6)
    whole = train(config, dp * sp)
    assert len(whole) == 6

    # The same run, killed by an exception in step 4; its last checkpoint is of step 2.
    halves = dataclasses.replace(config, run_dir=tmp_path / "halves", save_every=2, keep_checkpoints=1)

    def killed(_rank: int) -> None:
        original = step.Stepper.step

        def until_four(self: step.Stepper, number: int, **options: object) -> step.StepResult:
            if number == 3:
                raise KeyError("killed")
            return original(self, number, **options)  # type: ignore[arg-type]

        step.Stepper.step = until_four  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyError):
            trainer.train(halves)

    world.run(dp * sp, killed)
    assert halves.run_dir is not None
    assert checkpoint.find(halves.run_dir, report=pytest.fail).state["step"] == 2
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


def places(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, resume: Path | None = None) -> dict[int, list[int]]:
    """Run; which sequences of the text each step trained on."""
    seen: dict[int, list[int]] = {}
    original = step.Sequences.batch

    def noting(self: step.Sequences, number: int, rows: int, *given: object, **options: object) -> object:
        seen[number] = [self.number(number, row, rows) for row in range(rows)]
        return original(self, number, rows, *given, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(step.Sequences, "batch", noting)
        trainer.train(config, resume=resume)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_another_batch_size_goes_on_where_the_text_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], packed: bool
) -> None:
    config = small_config(tmp_path, steps=8, save_every=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packed=packed))
    whole = places(config, monkeypatch)
    expected = [place for number in range(8) for place in whole[number]]
    halves = dataclasses.replace(config, run_dir=tmp_path / "halves", steps=4, optimizer=OptimizerOptions())
    places(halves, monkeypatch)
    wider = dataclasses.replace(halves, global_batch=8, steps=6)
    seen = places(wider, monkeypatch, resume=halves.run_dir)
    assert [place for number in (4, 5) for place in seen[number]] == expected[16:]
    assert "global_batch: 4 -> 8" in capfd.readouterr().out
    lines = [line for line in read_metrics(tmp_path / "halves" / "metrics.jsonl") if "loss" in line]
    assert [line["tokens"] for line in lines] == [64 * count for count in (4, 8, 12, 16, 24, 32)]
    found = checkpoint.find(tmp_path / "halves", report=pytest.fail)
    assert found.state["data"]["next_sequence"] == 32
    # And once more: the position of a run of several parts is a sum.
    seen = places(dataclasses.replace(wider, global_batch=2, steps=7), monkeypatch, resume=halves.run_dir)
    assert seen[6] != whole[6][:2]  # what a position by the number of steps would be


def test_the_schedule_is_that_of_the_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step past its end has its last rate. The control stretches it, which is asked for and named."""
    options = OptimizerOptions(lr=1e-3, warmup_steps=2)
    config = small_config(tmp_path, steps=5, optimizer=options, save_every=2)
    train(config)
    with pytest.raises(ConfigError, match=r"nothing is left to train: .* 5 finished steps, and --steps.* is 4"):
        trainer.train(dataclasses.replace(config, steps=4), resume=config.run_dir)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    capfd.readouterr()
    rates = [line["lr"] for line in train(dataclasses.replace(config, steps=8), resume=config.run_dir)]
    assert rates == [learning_rate(min(number, 4), 5, options) for number in range(8)]
    said = capfd.readouterr().out
    assert "steps: 5 -> 8; the learning rate follows its schedule of 5 steps" in said and "schedule_steps" not in said
    longer = dataclasses.replace(options, schedule_steps=8)
    copied = dataclasses.replace(config, steps=8, optimizer=longer, run_dir=tmp_path / "copy")
    rates = [line["lr"] for line in train(copied, resume=copied.run_dir)][5:]
    assert rates == [learning_rate(number, 8, options) for number in range(5, 8)]
    assert "losses will differ: optimizer.schedule_steps: 5 -> 8" in capfd.readouterr().out


def test_rows_that_carry_on_keep_their_batch(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, carry=True))
    train(config)
    for change in ({"global_batch": 2}, {"seq_len": 32}):
        with pytest.raises(ConfigError, match=r"every row goes on where it was: --[a-z-]+ must stay (4|64)"):
            trainer.train(dataclasses.replace(config, steps=4, **change), resume=config.run_dir)


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


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGHUP,
        pytest.param(signal.SIGQUIT, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive),
    ],
)
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
        result = trainer.train(config)
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
        trainer.train(wider, resume=config.run_dir)
    with pytest.raises(ConfigError, match=r"is not empty: continue it with --resume"):
        trainer.train(config)
    (tmp_path / "text" / "part0" / "text0.txt").write_text("something else " * 100)
    with pytest.raises(DataError, match="the text has changed"):
        trainer.train(config, resume=config.run_dir)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, sp=1, save_every=6)
    whole = train(config)
    assert config.run_dir is not None
    older = config.run_dir / "checkpoints" / "step-00000006"
    with pytest.raises(ConfigError, match="is not the newest checkpoint of its run"):
        trainer.train(config, resume=older)
    (model,) = (config.run_dir / "checkpoints" / "step-00000012").glob("*.safetensors")
    model.write_bytes(model.read_bytes()[:-8])
    assert key(train(config, resume=config.run_dir)) == key(whole)
    said = capfd.readouterr().out
    assert "skipped a damaged checkpoint" in said and "falling back to" in said
