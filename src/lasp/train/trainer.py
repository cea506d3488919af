"""A whole training run: from a config to a folder with a checkpoint, metrics, a curve and a sample of text."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lasp import files
from lasp.analysis.devices import peak_flops
from lasp.analysis.flops import flops_per_token
from lasp.data import trigram
from lasp.data.tokenizer import files_of
from lasp.distributed.signals import stop_signals
from lasp.errors import CheckpointError, as_config_errors
from lasp.train import model as models
from lasp.train import text
from lasp.train.checkpoint import shards
from lasp.train.checkpoint.replicas import check_replicas
from lasp.train.checkpoint.shards import Saver
from lasp.train.config import TrainConfig
from lasp.train.evaluate import Score, evaluate
from lasp.train.logging.metrics import draw_curve
from lasp.train.logging.output import Output, Stopwatch
from lasp.train.logging.profile import Profiler
from lasp.train.logging.run_info import describe
from lasp.train.logging.run_logger import RunLogger
from lasp.train.logging.step_metrics import Machine
from lasp.train.logging.summary import introduction, scores, whereabouts
from lasp.train.position import Position, changes, position_of, record, settle, tokenizer_of_run
from lasp.train.run_folder import RunFolder
from lasp.train.sample import sample_text
from lasp.train.step import Stepper
from lasp.train.world import World, join, leave, naming_lost_peers


class TrainResult(NamedTuple):
    run_dir: Path
    finished_steps: int
    stopped: bool
    """Ended by a signal before the last step; a checkpoint was saved."""
    bits_per_byte: float | None
    trigram_bits_per_byte: float | None


def train(config: TrainConfig, *, resume: Path | None = None) -> TrainResult:
    """Train, in this process and all others of the launch (torchrun's environment, or a group that exists).

    resume: a run folder or checkpoint to continue from; the run goes on in the run folder. AUTO: that of
    `config.run_dir` if it has a checkpoint; if not, the run begins there. Raises ConfigError, DataError,
    CheckpointError, NumericsError, ReplicaError (on every process) and PeerLostError.
    """
    world = join(config, resume)
    try:
        with naming_lost_peers(world):
            output = Output(enabled=world.is_first, log_every=config.log_every)
            folder = RunFolder(config, world, resume, report=output.line)
            with folder.starting():
                trainer = Trainer(config, world, folder, output)
                trainer.begin()
            return trainer.train()
    finally:
        leave(world)


class Trainer:
    """One process's part of a run: steps, and between them validations and checkpoints.

    Attributes:
        config: the settings, with what the checkpoint that the run goes on from settles.
        start: where in the text it begins. finished: optimizer steps finished.
        text, model: what it trains on, and what.
    """

    def __init__(self, config: TrainConfig, world: World, folder: RunFolder, output: Output) -> None:
        """Everything but the first step; collective."""
        resumed = folder.resumed
        state = resumed.state if resumed is not None else None
        self.world, self.resumed, self.output, self.stopwatch = world, resumed, output, Stopwatch()
        self.config = config = settle(config, state)
        self.start = Position() if state is None else position_of(state, config)
        tokenizer = tokenizer_of_run(config, resumed)
        model_config = models.model_config(config, tokenizer.vocab_size)

        def prepare() -> dict[str, Any]:
            models.check_weights(config, model_config, resumed)
            store = text.prepare(config, tokenizer)
            return {"store": str(store), "run_dir": str(folder.open())}

        places = {name: Path(place) for name, place in world.run_on_first(prepare).items()}
        self.run_dir = places["run_dir"]
        if state is not None:
            for line in changes(config, state):
                output.line(line)
        self.text = text.open_text(
            config,
            places["store"],
            tokenizer,
            world,
            vocab_size=model_config.vocab_size,
            start=self.start,
            resumed=resumed,
        )
        self.model = models.build(config, model_config, world, resumed)
        self.stepper = Stepper(config, self.model.parallel, self.model.optimizer, self.text.sequences, world)
        self.finished = self.start.step
        self.saved_at = self.finished if resumed is not None else -1
        self.saver = Saver(
            self.run_dir / "checkpoints", world, keep=config.keep_checkpoints, beside=files_of(tokenizer)
        )
        self.logger: RunLogger | None = None
        self.profiler = Profiler(
            config.profile_steps,
            self.run_dir / "profile",
            rank=world.rank,
            device=world.device,
            attempt=output.attempt,
        )

    def begin(self) -> None:
        """Write down what the run is, rehearse a step, and say what is about to be done; collective."""
        config, world, output, run_dir = self.config, self.world, self.output, self.run_dir
        model, store, machine = self.model.parallel, self.text.store, self._machine()
        description = describe(config, self.model.config, model, world, store, machine)
        description["sample_prompt"] = self.text.prompt
        if world.is_first:
            settings = json.dumps(record(config), indent=1) + "\n"
            for name, content in {"config.json": settings.encode(), **files_of(self.text.tokenizer)}.items():
                output.attempt(name, partial(files.write, run_dir / name, content))
            self.logger = RunLogger(config, run_dir, output, machine, description=description, start=self.start)
        step_seconds = self._rehearse()
        output.table(
            f"Training {config.model.family}-{config.model.size}",
            introduction(
                config,
                world,
                model,
                store,
                run_dir,
                finished=self.finished,
                step_seconds=step_seconds,
                resumed=self.resumed,
            ),
        )
        output.line("")
        # After the rehearsals, which leave behind states of the right shapes.
        tensors = self.stepper.carried_tensors(self.finished)
        if self.resumed is not None and tensors:
            shards.load_others(self.resumed, tensors, world)
            self.stepper.resume_carried(self.finished)

    def train(self) -> TrainResult:
        """Run all steps that are left, then the score, the sample and the curve."""
        config, stopped = self.config, False
        signals: list[int] = []
        with stop_signals(signals.append, once=True):
            self.output.start(self.finished, config.steps)
            try:
                while self.finished < config.steps and not stopped:
                    stopped = self._step(lambda: bool(signals))
                    self._report(self.saver.poll())
                    last = self.finished == config.steps
                    if stopped or last or self.finished % config.save_every == 0:
                        self._save()
                    if self.finished % config.eval_every == 0 and not last and not stopped:
                        self._evaluate(max(1, config.eval_sequences // 8))
            finally:
                self.output.stop()
                self.profiler.close()
                # However the steps end, what was copied to be written is written, in the time that others have.
                failed = sys.exc_info()[1] is not None
                unsaved = self.saver.leave(config.parallel.timeout_s) if failed else self.saver.finish()
                if failed and unsaved is not None:
                    self.output.line(unsaved)
        if unsaved is not None:
            raise CheckpointError(f"{unsaved}; older checkpoints are as they were, in {self.saver.root}")
        trained_s = self.stopwatch.seconds()
        score = None if stopped else self._evaluate(config.eval_sequences)
        if score is not None and config.sample.num_tokens > 0:
            self.world.place.text = "generating text"
            sample_text(
                config,
                self.world,
                self.model.parallel,
                self.text.tokenizer,
                self.text.prompt,
                self.output,
                self.run_dir,
                autocast_dtype=self.stepper.autocast_dtype,
            )
        self.world.place.text = "at the end"
        # The others wait, so that no launcher takes the run for finished before everything is written.
        end = self.world.run_on_first(lambda: self._conclude(score, trained_s))
        bits = score.bits_per_byte if score is not None else None
        return TrainResult(self.run_dir, self.finished, stopped, bits, end["trigram"])

    def _machine(self) -> Machine:
        """The work and the speed that utilisation is counted against."""
        device, peak = self.world.device, None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self.config.precision)
        return Machine(flops_per_token(self.model.config, self.config.seq_len).step, peak)

    def _rehearse(self) -> float:
        """Seconds of one step: the better of two rehearsals, after one in which everything is new."""
        self.world.place.text = "rehearsing a step"
        random_state = torch.get_rng_state()
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            with as_config_errors():
                self.stepper.rehearse()
            seconds.append(time.monotonic() - began)
        torch.set_rng_state(random_state)
        return min(seconds[1:])

    def _step(self, stop_requested: Callable[[], bool]) -> bool:
        began = time.monotonic()
        self.world.place.text = f"in step {self.finished + 1}"
        with self.profiler.step(self.finished + 1):
            result = self.stepper.step(self.finished, stop_requested=stop_requested)
        self.finished += 1
        if self.logger is not None:
            self.logger.step(self.finished, result, time.monotonic() - began)
        return result.stop

    def _evaluate(self, max_sequences: int) -> Score:
        self.world.place.text = f"validating after step {self.finished}"
        score = evaluate(
            self.model.parallel,
            self.text.store,
            self.world,
            seq_len=self.config.seq_len,
            num_rows=self.config.global_batch // self.config.accumulation,
            max_sequences=max_sequences,
            packed=self.config.data.packed,
            autocast_dtype=self.stepper.autocast_dtype,
        )
        if self.logger is not None:
            self.logger.validation(self.finished, score)
        self.output.line(f"step {self.finished}: validation {score.bits_per_byte:.4f} bits per byte")
        return score

    def _save(self) -> None:
        """Begin to write a checkpoint of the steps finished so far."""
        if self.saved_at == self.finished:
            return
        module, optimizer = self.model.module, self.model.optimizer
        check_replicas(self.finished, module, optimizer, self.world)
        here, shard = self.start.at(self.finished, self.config), self.world.shard
        state = {
            "step": self.finished,
            "data": {"key": self.text.store.key, "next_sequence": here.sequence, "tokens": here.tokens},
            "layout": {
                "dp": shard.dp_size,
                "sp": shard.sp_size,
                "data_parallel": self.model.parallel.data_parallel,
            },
            "tokenizer": self.text.tokenizer.name,
            "model_config": self.model.config.to_dict(),
            "sample_prompt": self.text.prompt,
            "config": record(self.config),
        }
        self._report(self.saver.start(module, optimizer, state, self.stepper.carried_tensors(self.finished)))
        self.saved_at = self.finished

    def _report(self, unsaved: str | None) -> None:
        if unsaved is not None:
            self.output.line(f"{unsaved}; older checkpoints are as they were, and training goes on")

    def _conclude(self, score: Score | None, seconds: float) -> dict[str, Any]:
        """Write, on the first process, the score to beat, the curve, and where everything is."""
        store, run_dir, output = self.text.store, self.run_dir, self.output
        baseline, by_byte = None, store.tokenizer == "bytes"
        if score is not None and by_byte:
            baseline = trigram.bits_per_byte(store.train, store.validation, score.num_tokens)
        if self.logger is not None:
            self.logger.close(self.finished, baseline)
        picture = run_dir / "curve.png"
        problems: list[str | None] = []
        drawn = output.attempt(
            "curve.png",
            lambda: problems.append(draw_curve(run_dir / "metrics.jsonl", picture, by_byte=by_byte, trigram=baseline)),
        )
        rows = {} if score is None else scores(score, baseline)
        rows |= whereabouts(
            self.config,
            run_dir,
            finished=self.finished,
            seconds=seconds,
            prompt=self.text.prompt,
            curve=(problems[0] or str(picture)) if drawn else "none",
        )
        output.table("Finished" if score is not None else "Stopped; saved", rows)
        output.close(self.config.parallel.timeout_s)
        return {"trigram": baseline}
