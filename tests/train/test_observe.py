"""What a run writes down about its steps, against independent counts."""

from __future__ import annotations

import dataclasses
import io
import resource
import time
from pathlib import Path

import pytest
import world
from rich.console import Console
from training_runs import SMALL, small_config

from lasp.train import step, trainer
from lasp.train.logging.metrics import read_metrics
from lasp.train.logging.output import Output
from lasp.train.logging.run_logger import RunLogger
from lasp.train.logging.step_metrics import Machine, figures_of, slow_rank
from lasp.train.logging.step_timer import RankStep
from lasp.train.position import Position
from lasp.train.step import StepResult

DP, SP = 2, 2
PARTS = ("own_s", "exposed_s", "summing_s")


def rank(own_s: float, *, sent: float = 0.0, exposed: float = 0.1, memory: float = 1.0) -> RankStep:
    return RankStep(own_s, exposed, 0.05, 0.02, sent, memory)


def test_figures_of_a_run(tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(tmp_path, dp=DP, sp=SP, steps=4, log_every=1), accumulation=2)

    def work(_rank: int) -> int:
        trainer.train(config)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    largest = max(world.run(DP * SP, work))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps, ranks = ([line for line in lines if name in line] for name in ("loss", "ranks"))
    assert [line["step"] for line in steps] == [line["step"] for line in ranks] == [1, 2, 3, 4]
    # Each of the two directions moves every layer's fp32 states once over the one border of each sequence.
    keys = 2 * SMALL["key_dim"] + SMALL["key_dim"]  # the first of the two layers has LRPE, which doubles them
    states = keys * SMALL["num_heads"] * SMALL["value_dim"] * config.global_batch
    for line, compared in zip(steps, ranks, strict=True):
        assert line["exchanged_bytes"] == sum(compared["ranks"]["sent_bytes"]) == 2 * 4 * states
        assert line["tokens_per_s"] * line["step_s"] == pytest.approx(config.global_batch * config.seq_len, rel=2e-3)
        assert 30e6 < line["peak_memory_bytes"] <= largest
        assert "mfu" not in line  # no CPU has a known peak
        assert all(value >= 0 for name in PARTS for value in compared["ranks"][name])
        # The parts of a step do not overlap, and the first rank's step contains its parts.
        assert sum(compared["ranks"][name][0] for name in PARTS) <= line["step_s"] * 1.002
        for name in ("exposed_s", "summing_s", "hidden_s"):
            assert line[name] == pytest.approx(sum(compared["ranks"][name]) / (DP * SP), rel=2e-3)
        assert line["slowest_s"] == max(compared["ranks"]["own_s"])


def test_a_slow_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, sp=2, steps=2, log_every=2)

    def work(number: int) -> None:
        original = step.Stepper._batch

        def late(self: step.Stepper, *arguments: int) -> object:
            time.sleep(1.0 if number == 1 else 0)  # the fault: one rank's data come late, by more than a busy machine
            return original(self, *arguments)

        step.Stepper._batch = late  # type: ignore[method-assign,assignment]
        trainer.train(config)

    world.run(2, work)
    (compared,) = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "ranks" in line)
    assert compared["slow"].startswith("rank 1 is slow") and compared["steps"] == 2
    assert "rank 1 is slow: its own work takes" in capfd.readouterr().out


def test_what_is_slow() -> None:
    def steps(*rows: tuple[float, ...]) -> list[list[RankStep]]:
        return [[rank(own_s) for own_s in row] for row in rows]

    assert slow_rank(steps((0.10, 0.11, 0.12))) is None and slow_rank(steps((9.0,))) is None
    line = slow_rank(steps(*[(0.10, 0.30, 0.12)] * 3, (0.4, 0.3, 0.1)))
    assert line is not None and str(line).startswith("rank 1 is slow: its own work takes 300 ms")
    # One hiccup in a window makes nobody slow, and taking turns neither.
    assert slow_rank(steps(*[(0.1, 0.1)] * 4, (0.1, 5.0))) is None
    assert slow_rank(steps(*[(0.1, 0.5, 0.1), (0.6, 0.5, 0.1)] * 3)) is None

    # Nor does a rank that the others hardly wait for, however much longer its share of a short step is.
    assert slow_rank(steps(*[(0.032, 0.040)] * 4)) is None and slow_rank(steps(*[(0.032, 0.055)] * 4)) is not None


def test_a_slow_rank_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, steps=20, log_every=2)
    (tmp_path / "run").mkdir()
    output = Output(enabled=True, log_every=config.log_every)
    machine = Machine(flops_per_token=1.0, peak_flops=None)
    observer = RunLogger(config, tmp_path / "run", output, machine, description={}, start=Position())
    windows = [(0.1, 0.2), (0.1, 0.2), (0.1, 0.1), (0.1, 0.2), (0.1, 0.5), (0.2, 0.1)]
    for number in range(1, 2 * len(windows) + 1):
        ranks = tuple(rank(own_s) for own_s in windows[(number - 1) // 2])
        observer.step(number, StepResult(2.0, 1.0, 0.1, ranks, stop=False), 1.0)
    observer.close(number, None)
    said = [line[:38] for line in capsys.readouterr().out.splitlines() if "is slow" in line]
    # Not every window: of a rank when it is first slow, and when the others wait twice as long for it.
    assert said == [
        f"rank {slow} is slow: its own work takes {ms}" for slow, ms in ((1, "200"), (1, "500"), (0, "200"))
    ]
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "ranks" in line]
    assert [line["slow"] is not None for line in lines] == [True, True, False, True, True, True]


def test_a_terminal_of_80_columns_shows_step_and_time_left() -> None:
    output = Output(enabled=True, log_every=1)
    output.console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, color_system=None)  # type: ignore[assignment]
    result = StepResult(2.0, 1.0, 0.1, (rank(0.4, sent=1 << 20, memory=1 << 30),), stop=False)
    figures = figures_of(7, result, seconds=0.5, tokens_per_step=1 << 20, tokens=7 << 20, machine=Machine(6e9, 1e15))
    output.start(6, 100_000)
    output.step(7, 100_000, seconds=0.5, figures=figures)
    output.stop()
    last = output.console.file.getvalue().replace("\r", "\n").split("\n")  # type: ignore[attr-defined]
    shown = [line for line in last if "7/100000" in line][-1]
    assert "13 h 53 min left  loss 2.0000  2,097,152 tokens/s" in shown and "…" not in shown


def test_utilisation_is_of_all_devices() -> None:
    result = StepResult(2.0, 1.0, 0.1, (rank(0.4, sent=10), rank(0.3, sent=20)), stop=False)
    machine = Machine(flops_per_token=6e9, peak_flops=1e12)
    figures = figures_of(7, result, seconds=0.5, tokens_per_step=100, tokens=700, machine=machine)
    assert figures.tokens_per_s == 200 and figures.tokens == 700
    assert figures.mfu == pytest.approx(200 * 6e9 / 2e12)
    assert (figures.slowest_rank, figures.slowest_s, figures.fastest_s, figures.exchanged_bytes) == (0, 0.4, 0.3, 30)
    assert figures_of(7, result, seconds=1.0, tokens_per_step=1, tokens=7, machine=Machine(6e9, None)).mfu is None
