"""Whatever is written down while a run trains: one observer, told of every step and every validation.

Lines of metrics.jsonl, all with "step", the number of finished optimizer steps:
    every step          the fields of lasp.train.logging.step_metrics.StepFigures
    every --log-every   "ranks": for each figure of lasp.train.logging.step_timer.RankStep a list by global rank, the
                        median of the "steps" since the last such line; "slow": a sentence, if one rank is slow
    every validation    "validation_bits_per_byte", "validation_tokens"
    the end             "trigram_bits_per_byte": of the byte 3-gram model on the text of the last validation
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lasp.train.config import TrainConfig
from lasp.train.evaluate import Score
from lasp.train.logging import run_info
from lasp.train.logging.metrics import MetricsFile
from lasp.train.logging.output import Output
from lasp.train.logging.step_metrics import Machine, SlowRank, StepFigures, figures_of, slow_rank, typical
from lasp.train.logging.step_timer import RankStep
from lasp.train.logging.trackers import open_trackers
from lasp.train.position import Position
from lasp.train.settings_file import to_dict
from lasp.train.step import StepResult


class RunLogger:
    """Writes a run's figures, on the first process; the others have none."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        output: Output,
        machine: Machine,
        *,
        description: dict[str, Any],
        start: Position,
    ) -> None:
        finished = start.step
        self._config, self._output, self._machine, self._start = config, output, machine, start
        output.attempt("run.json", lambda: run_info.write(run_dir, description))
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", finished_steps=finished)
        if self._metrics.num_damaged:
            output.line(
                f"metrics.jsonl: {self._metrics.num_damaged} damaged lines left out; metrics.jsonl.damaged has all"
            )
        self._trackers = open_trackers(config.track, run_dir, to_dict(config) | description, finished=finished)
        self._window: list[tuple[RankStep, ...]] = []
        self._said: SlowRank | None = None

    def step(self, number: int, result: StepResult, seconds: float) -> None:
        """Step `number` (from 1) has ended after `seconds`."""
        config = self._config
        figures = figures_of(
            number,
            result,
            seconds=seconds,
            tokens_per_step=config.global_batch * config.seq_len,
            tokens=self._start.at(number, config).tokens,
            machine=self._machine,
        )
        self._write(number, **_rounded(figures))
        self._output.step(number, config.steps, seconds=seconds, figures=figures)
        self._window.append(result.ranks)
        if number % config.log_every == 0 or number == config.steps or result.stop:
            self._compare_ranks(number)

    def validation(self, number: int, score: Score) -> None:
        """The model was scored after step `number`."""
        self._write(number, validation_bits_per_byte=score.bits_per_byte, validation_tokens=score.num_tokens)

    def close(self, number: int, trigram: float | None) -> None:
        """The run has ended after step `number`."""
        if trigram is not None:
            self._write(number, trigram_bits_per_byte=trigram)
        self._output.attempt("metrics.jsonl", self._metrics.close)
        for tracker in self._trackers:
            self._output.attempt(f"--track {tracker.name}", tracker.close)

    def _write(self, number: int, **values: float) -> None:
        self._write_line(step=number, **values)
        for tracker in self._trackers:
            self._output.attempt(f"--track {tracker.name}", partial(tracker.scalars, number, values))

    def _write_line(self, **values: Any) -> None:
        self._output.attempt("metrics.jsonl", lambda: self._metrics.write(**values))

    def _compare_ranks(self, number: int) -> None:
        ranks = typical(self._window)
        slow = slow_rank(self._window)
        self._write_line(
            step=number,
            steps=len(self._window),
            ranks={name: [_short(getattr(rank, name)) for rank in ranks] for name in RankStep._fields},
            slow=None if slow is None else str(slow),
        )
        if slow is not None and slow.is_news_after(self._said):
            self._said = slow
            self._output.line(str(slow))
        self._window.clear()


def _rounded(figures: StepFigures) -> dict[str, float]:
    """Figures as written: results to the last digit, since resumed runs are compared by them; measurements to a few."""
    exact = ("loss", "lr", "grad_norm")
    return {
        name: value if name in exact or not isinstance(value, float) else _short(value)
        for name, value in figures._asdict().items()
        if name != "step" and value is not None
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}") if value < 1e3 else round(value)
