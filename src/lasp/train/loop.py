"""A whole training run: from a config to a folder with a checkpoint, metrics, a curve and a sample of text."""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from lasp import files
from lasp.analysis.devices import peak_flops
from lasp.analysis.flops import flops_per_token
from lasp.data import store as token_store
from lasp.data import trigram
from lasp.data.batches import Sequences
from lasp.data.errors import DataError
from lasp.data.tokenizer import files_of
from lasp.models import CausalLM, ModelConfig
from lasp.parallelize import ParallelModel, parallelize
from lasp.train import checkpoint, export, shards
from lasp.train.checkpoint import Checkpoint
from lasp.train.config import AUTO, TrainConfig
from lasp.train.errors import CheckpointError, ConfigError, refusing
from lasp.train.evaluate import Score, evaluate
from lasp.train.lock import LOCK, lock
from lasp.train.metrics import draw_curve
from lasp.train.optimizer import build_optimizer
from lasp.train.output import Output, Stopwatch, bytes_text, duration
from lasp.train.position import Position, changes, position_of, record, settle, tokenizer_of_run
from lasp.train.profile import Profiler
from lasp.train.program import lasp_command
from lasp.train.replicas import check_replicas
from lasp.train.run_info import describe
from lasp.train.run_logger import Observer
from lasp.train.sample import first_words, stream_text
from lasp.train.shards import Saver
from lasp.train.step import Stepper
from lasp.train.step_metrics import Machine
from lasp.train.stopping import stop_signals
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
            return _Run(config, world, resume).train()
    finally:
        leave(world)


def model_config(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The model's own configuration. Raises ConfigError for one that does not exist, or cannot carry its state."""
    model = config.model.build(vocab_size=vocab_size)
    if config.data.carry and any(model.is_softmax(layer) for layer in range(model.num_layers)):
        raise ConfigError("--data.carry needs layers whose memory does not grow: this model has softmax attention")
    return model


def spread(config: TrainConfig, module: CausalLM, world: World) -> ParallelModel:
    """`module` over the processes as the configuration says. Raises ConfigError for what the model cannot do."""
    parallel = config.parallel
    shares = parallel.data_parallel in ("zero2", "zero3") and world.size > 1
    try:
        return parallelize(
            module,
            world.mesh,
            data_parallel=parallel.data_parallel,
            gather_dtype=torch.bfloat16 if shares and config.precision == "bf16" else None,
            cpu_offload=parallel.cpu_offload,
            recomputation=parallel.recomputation,
            ffn_piece_tokens=parallel.ffn_piece_tokens,
            compile=parallel.compile,
            exchange=parallel.exchange,
            timeout_s=parallel.timeout_s,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


class _Run:
    def __init__(self, config: TrainConfig, world: World, resume: Path | None) -> None:
        self.world = world
        self.watch = Stopwatch()
        self.output = Output(enabled=world.is_first, log_every=config.log_every)
        self._made: Path | None = None
        self.config = config
        self.lock: IO[bytes] | None = None
        try:
            # Whoever looks before the folder is its own may go on from what another run is about to replace.
            world.run_on_first(lambda: self._claim(resume))
            self.resumed = self._find_checkpoint(config, resume)
            state = self.resumed.state if self.resumed is not None else None
            self.config = settle(config, state)
            self.start = Position() if state is None else position_of(state, config)
            self._set_up(resume)
        except BaseException:
            self._leave_nothing()
            raise

    def _set_up(self, resume: Path | None) -> None:
        """Everything but the first step. On an error `_leave_nothing` undoes it."""
        config, world = self.config, self.world
        self.tokenizer = tokenizer_of_run(config, self.resumed)
        self.model_config = model_config(config, self.tokenizer.vocab_size)
        start = world.run_on_first(lambda: self._prepare(resume))
        self.run_dir = Path(start["run_dir"])
        if self.resumed is not None:
            for line in changes(config, self.resumed.state):
                self.output.line(line)
        self.store = token_store.open_store(Path(start["store"]), verify=False)
        self._check_data()
        world.compare({"data key": self.store.key})
        given = config.sample.prompt
        self.sample_prompt: str = first_words(self.store, self.tokenizer) if given is None else given
        bounds = self.store.train_bounds if config.data.packed else None
        self.sequences = Sequences(
            self.store.train,
            seq_len=config.seq_len,
            seed=config.seed,
            bounds=bounds,
            consecutive=config.data.carry,
            origin=self.start[:2],
        )
        torch.manual_seed(config.seed)
        self.module = CausalLM(self.model_config).to(world.device)
        if self.resumed is None and config.init_from is not None:
            export.load_weights(config.init_from, self.module)
        self.model = spread(config, self.module, world)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if self.resumed is not None:
            shards.load(self.resumed, self.module, self._model_dict(), optimizer=self.optimizer, world=world)
        self.stepper = Stepper(config, self.model, self.optimizer, self.sequences, world)
        self.finished = self.start.step
        self.saver = Saver(
            self.run_dir / "checkpoints", world, keep=config.keep_checkpoints, beside=files_of(self.tokenizer)
        )
        self.saved_at = self.finished if self.resumed is not None else -1
        self.observer: Observer | None = None
        self.profiler = Profiler(
            config.profile_steps,
            self.run_dir / "profile",
            rank=world.rank,
            device=world.device,
            attempt=self.output.attempt,
        )

    def train(self) -> TrainResult:
        config = self.config
        try:
            self._begin()
        except BaseException:
            self._leave_nothing()
            raise
        stopped = False
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
        trained_s = self.watch.seconds()
        score = None if stopped else self._evaluate(config.eval_sequences)
        if score is not None and config.sample.num_tokens > 0:
            self._sample()
        self.world.place.text = "at the end"
        # The others wait, so that no launcher takes the run for finished before everything is written.
        end = self.world.run_on_first(lambda: self._conclude(score, trained_s))
        bits = score.bits_per_byte if score is not None else None
        return TrainResult(self.run_dir, self.finished, stopped, bits, end["trigram"])

    def _begin(self) -> None:
        machine = self._machine()
        description = describe(self.config, self.model_config, self.model, self.world, self.store, machine)
        description["sample_prompt"] = self.sample_prompt
        if self.world.is_first:
            settings = json.dumps(record(self.config), indent=1) + "\n"
            for name, content in {"config.json": settings.encode(), **files_of(self.tokenizer)}.items():
                self.output.attempt(name, partial(files.write, self.run_dir / name, content))
            self.observer = Observer(
                self.config, self.run_dir, self.output, machine, description=description, start=self.start
            )
        self._introduce(self._measure_step())
        self._resume_carried()

    def _leave_nothing(self) -> None:
        """A start that failed before its first step leaves no folder, and so no run to continue."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)

    def _step(self, stop_requested: Callable[[], bool]) -> bool:
        began = time.monotonic()
        self.world.place.text = f"in step {self.finished + 1}"
        with self.profiler.step(self.finished + 1):
            result = self.stepper.step(self.finished, stop_requested=stop_requested)
        self.finished += 1
        if self.observer is not None:
            self.observer.step(self.finished, result, time.monotonic() - began)
        return result.stop

    def _machine(self) -> Machine:
        """What utilisation is counted against."""
        device, peak = self.world.device, None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self.config.precision)
        return Machine(flops_per_token(self.model_config, self.config.seq_len).step, peak)

    def _evaluate(self, max_sequences: int) -> Score:
        self.world.place.text = f"validating after step {self.finished}"
        score = evaluate(
            self.model,
            self.store,
            self.world,
            seq_len=self.config.seq_len,
            num_rows=self.config.global_batch // self.config.accumulation,
            max_sequences=max_sequences,
            packed=self.config.data.packed,
            autocast_dtype=self.stepper.autocast_dtype,
        )
        if self.observer is not None:
            self.observer.validation(self.finished, score)
        self.output.line(f"step {self.finished}: validation {score.bits_per_byte:.4f} bits per byte")
        return score

    def _save(self) -> None:
        """Begin to write a checkpoint of the steps finished so far."""
        if self.saved_at == self.finished:
            return
        check_replicas(self.finished, self.module, self.optimizer, self.world)
        here = self.start.at(self.finished, self.config)
        state = {
            "step": self.finished,
            "data": {
                "key": self.store.key,
                "next_sequence": here.sequence,
                "tokens": here.tokens,
            },
            "layout": {
                "dp": self.world.shard.dp_size,
                "sp": self.world.shard.sp_size,
                "data_parallel": self.model.data_parallel,
            },
            "tokenizer": self.tokenizer.name,
            "model_config": self._model_dict(),
            "sample_prompt": self.sample_prompt,
            "config": record(self.config),
        }
        self._report(self.saver.start(self.module, self.optimizer, state, self.stepper.carried_tensors(self.finished)))
        self.saved_at = self.finished

    def _report(self, unsaved: str | None) -> None:
        if unsaved is not None:
            self.output.line(f"{unsaved}; older checkpoints are as they were, and training goes on")

    def _find_checkpoint(self, config: TrainConfig, resume: Path | None) -> Checkpoint | None:
        if resume == AUTO:
            run_dir = config.run_dir
            begun = self.world.run_on_first(lambda: {"yes": run_dir is not None and checkpoint.exists(run_dir)})["yes"]
            resume = run_dir if begun else None
        if resume is None:
            return None
        return checkpoint.find(resume, report=self.output.line, world=self.world)

    def _claim(self, resume: Path | None) -> dict[str, Any]:
        """On the first process: take the run folder, where there is one."""
        home = None
        if resume is not None and resume != AUTO:
            checkpoint.candidates(resume)
            home = checkpoint.run_folder(resume)
        run_dir = self.config.run_dir or home
        if run_dir is not None and run_dir.exists():
            if resume != AUTO and (home is None or run_dir.resolve() != home.resolve()):
                _refuse_full(run_dir)  # before a lock is put there
            self.lock = lock(run_dir)
            checkpoint.restore(run_dir / "checkpoints")
        return {}

    def _prepare(self, resume: Path | None) -> dict[str, Any]:
        """On the first process: tokenise the text, make the run folder."""
        config = self.config
        if self.resumed is None and config.init_from is not None:
            export.check(config.init_from, self._model_dict())
        store = token_store.prepare(
            folder=config.data.path,
            suffixes=config.data.suffixes,
            field=config.data.field,
            tokenizer=self.tokenizer,
            validation_fraction=config.data.validation_fraction,
            seed=config.data.seed,
            cache=config.data.cache,
            validation_path=config.data.validation_path,
            on_bad_record=config.data.on_bad_record,
            verify=config.data.verify,
        )
        run_dir = self._choose_folder(resume)
        if self.lock is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            is_new = not any(run_dir.iterdir())
            self.lock = lock(run_dir)
            _refuse_full(run_dir)  # another run may have begun there while the text was prepared
            if is_new:
                self._made = run_dir
        return {"run_dir": str(run_dir), "store": str(store.folder)}

    def _choose_folder(self, resume: Path | None) -> Path:
        """The run folder: as configured, that of the run continued, or a new one. Raises ConfigError.

        With AUTO, what is in it may be of an earlier try that ended before its first checkpoint.
        """
        found = self.resumed
        home = checkpoint.run_folder(found.folder) if found is not None else None
        run_dir = self.config.run_dir or home
        if run_dir is None:
            return _new_folder(Path("runs"), f"{self.config.model.family}-{self.config.model.size}")
        if home is not None and found is not None and run_dir.resolve() == home.resolve():
            named = resume is not None and checkpoint.is_checkpoint(resume)  # else it is the newest that is good
            newest = checkpoint.find(home, report=lambda _: None).folder if named else found.folder
            if newest.resolve() != found.folder.resolve():
                raise ConfigError(
                    f"{found.folder} is not the newest checkpoint of its run ({newest.name} is), and going on "
                    "from it would write over what followed: name a new folder with --run-dir"
                )
        return run_dir

    def _check_data(self) -> None:
        if self.store.vocab_size > self.model_config.vocab_size:
            raise ConfigError(
                f"the model's vocabulary of {self.model_config.vocab_size:,} is smaller than that of the text, "
                f"{self.store.vocab_size:,}: leave vocab_size out of --model.overrides"
            )
        if self.resumed is not None and self.resumed.state["data"]["key"] != self.store.key:
            raise DataError(
                f"the text has changed since {self.resumed.folder} was written, so its run cannot be continued "
                "on the same data: restore the text and --data options, or start a new run"
            )
        if len(self.store.validation) < 2:
            raise DataError(
                "no text is held out to validate on: raise --data.validation-fraction, or name some with "
                "--data.validation-path"
            )

    def _measure_step(self) -> float:
        """Seconds of one step: the better of two rehearsals, after one in which everything is new."""
        self.world.place.text = "rehearsing a step"
        random_state = torch.get_rng_state()
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            with refusing():
                self.stepper.rehearse()
            seconds.append(time.monotonic() - began)
        torch.set_rng_state(random_state)
        return min(seconds[1:])

    def _resume_carried(self) -> None:
        """After the rehearsals, which leave behind states of the right shapes."""
        tensors = self.stepper.carried_tensors(self.finished)
        if self.resumed is not None and tensors:
            shards.load_others(self.resumed, tensors, self.world)
            self.stepper.resume_carried(self.finished)

    def _introduce(self, step_seconds: float) -> None:
        config, shard, world, store = self.config, self.world.shard, self.world, self.store
        optimizer = config.optimizer
        tokens = config.global_batch * config.seq_len
        source = config.data.path or "the Python standard library of this machine"
        layout = f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}: "
        layout += f"dp {shard.dp_size} x sp {shard.sp_size}, "
        layout += self.model.data_parallel if world.size > 1 else "all weights in it"
        if world.size == 1 and config.parallel.data_parallel != "ddp":
            layout += f" (--data-parallel {config.parallel.data_parallel} needs several processes: start more)"
        if config.parallel.dp_replicate > 1:
            layout += f" in {config.parallel.dp_replicate} copies"
        if self.model.sp is not None:
            layout += f", {config.seq_len // shard.sp_size} of {config.seq_len} tokens each, "
            layout += f"states by {self.model.sp.exchange.name}"
        tokenizer = config.data.tokenizer or store.tokenizer
        if config.init_from is not None and self.resumed is None:
            tokenizer += f", that of {config.init_from}"
        num_parameters = sum(p.numel() for p in self.module.parameters())
        self.output.table(
            f"Training {config.model.family}-{config.model.size}",
            {
                "model": f"{num_parameters:,} parameters, {config.precision}",
                "text": f"{source}: {bytes_text(store.num_bytes['train'])} in {store.num_documents['train']} "
                f"documents to train on, {bytes_text(store.num_bytes['validation'])} in "
                f"{store.num_documents['validation']} held out; tokenizer {tokenizer}",
                "documents": store.reading.summary(),
                "layout": layout,
                "work": f"{config.steps - self.finished} steps of {config.global_batch} x {config.seq_len} = "
                f"{tokens:,} tokens, about {duration((config.steps - self.finished) * step_seconds)}"
                if self.finished < config.steps
                else f"nothing is left: all {config.steps} steps are finished",
                "schedule": f"{optimizer.warmup_steps} steps of warm-up, then cosine until step "
                f"{optimizer.schedule_steps}",
                "run folder": str(self.run_dir),
                **(
                    {"resumed": f"{self.resumed.folder}, after step {self.finished}"}
                    if self.resumed is not None
                    else {}
                ),
            },
        )
        self.output.line("")

    def _conclude(self, score: Score | None, seconds: float) -> dict[str, Any]:
        """On the first process: the score to beat, the sample, the curve, and where everything is."""
        config, run_dir = self.config, self.run_dir
        baseline, by_byte = None, self.store.tokenizer == "bytes"
        if score is not None and by_byte:
            baseline = trigram.bits_per_byte(self.store.train, self.store.validation, score.num_tokens)
        if self.observer is not None:
            self.observer.close(self.finished, baseline)
        rows = {}
        if score is not None:
            rows["validation"] = f"{score.bits_per_byte:.4f} bits per byte on {score.num_tokens:,} tokens"
            if baseline is not None:
                better = 1 - score.bits_per_byte / baseline
                rows["byte 3-gram"] = f"{baseline:.4f} bits per byte on the same tokens; the model needs " + (
                    f"{better:.1%} fewer" if better >= 0 else f"{-better:.1%} more"
                )
        picture = run_dir / "curve.png"
        problems: list[str | None] = []
        drawn = self.output.attempt(
            "curve.png",
            lambda: problems.append(draw_curve(run_dir / "metrics.jsonl", picture, by_byte=by_byte, trigram=baseline)),
        )
        rows |= {
            "time": f"{duration(seconds)} for {self.finished} of {config.steps} steps and start-up",
            "run folder": str(run_dir),
            "checkpoint": str(run_dir / "checkpoints" / f"step-{self.finished:08d}"),
            "metrics": str(run_dir / "metrics.jsonl"),
            "report": lasp_command("report", run_dir),
            "loss curve": (problems[0] or str(picture)) if drawn else "none",
            "more text": lasp_command("generate", run_dir, "--prompt", self.sample_prompt),
        }
        if self.finished < config.steps:
            rows["continue"] = lasp_command("train", "--resume", run_dir)
        self.output.table("Finished" if score is not None else "Stopped; saved", rows)
        self.output.close(config.parallel.timeout_s)
        return {"trigram": baseline}

    def _sample(self) -> None:
        """Generate text, print it as it comes and keep it in the run folder."""
        self.world.place.text = "generating text"
        # Of sharded weights no process has enough to run the model alone; else the others need not.
        if self.model.is_sharded:
            self._generate()
        else:
            self.world.run_on_first(self._generate)

    def _generate(self) -> dict[str, Any]:
        """The text, of which only the first process prints and keeps anything."""
        self.output.heading("Generated text")
        options = dataclasses.replace(self.config.sample, prompt=self.sample_prompt)
        chosen = "given" if self.config.sample.prompt is not None else "the first words of the held-out text"
        self.output.line(f"(after {self.sample_prompt!r}, {chosen})")
        pieces = []
        autocast_dtype = self.stepper.autocast_dtype
        with torch.autocast(self.world.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            for piece in stream_text(
                self.module, self.tokenizer, options, seed=self.config.seed, device=self.world.device
            ):
                pieces.append(piece)
                self.output.piece(piece)
        self.model.release()
        self.output.line("")
        if self.world.is_first:
            self.output.attempt("sample.txt", lambda: files.write(self.run_dir / "sample.txt", "".join(pieces)))
        return {}

    def _model_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model_config)


def _refuse_full(run_dir: Path) -> None:
    """Raise ConfigError unless there is nothing in a run folder but its lock."""
    if any(item.name != LOCK for item in run_dir.iterdir()):
        advice = f"continue it with --resume {run_dir}, or name" if checkpoint.exists(run_dir) else "name"
        raise ConfigError(f"{run_dir} is not empty: {advice} another")


def _new_folder(parent: Path, name: str) -> Path:
    """A folder below `parent` that does not exist yet, named by the time of day."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = parent / f"{name}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"cannot find a free name below {parent}: give --run-dir")
