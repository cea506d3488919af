"""Every setting of a training run: frozen dataclasses, and checks made before anything starts."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from lasp.errors import ConfigError
from lasp.exchange import NAMES
from lasp.models import NAMES as FAMILIES
from lasp.models import SIZES, ModelConfig, preset
from lasp.models.config import setting_kind, setting_names
from lasp.train.logging.profile import parse_range
from lasp.train.logging.trackers import missing
from lasp.train.preflight import check_folder, check_seed, check_text
from lasp.train.sizes import Tokens

if TYPE_CHECKING:
    Family: TypeAlias = str
    Size: TypeAlias = str
else:  # as the files of lasp.layers register them
    Family, Size = Literal[FAMILIES], Literal[SIZES]

# Instead of a checkpoint to resume from: the newest good one of the run folder, or none if it has none yet.
AUTO = Path("auto")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model: a named preset."""

    family: Family = "transnormer"
    """Kind of model."""
    size: Size = "tiny"
    """Size of the preset."""
    overrides: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    """Fields of the preset and its mixers to change, such as `num_layers 2 layer_pattern LLLN conv_width 3`."""

    def build(self, **defaults: Any) -> ModelConfig:
        """The model's own configuration. defaults: fields, such as the vocabulary, that an override wins over.

        Raises ConfigError for a model that does not exist, an override that it does not have, or a wrong value.
        """
        known = setting_names()
        for name in self.overrides:
            if name not in known:
                raise ConfigError(f"--model.overrides: no field {name!r}; known: {', '.join(known)}")
        try:
            changes = {name: _read(name, value) for name, value in self.overrides.items()}
            return preset(self.family, self.size, **{**defaults, **changes})
        except ValueError as error:
            raise ConfigError(f"--model: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The text."""

    path: Path | None = None
    """Folder of text, or of data built by `lasp data build`; default: the Python standard library's own source."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
    """File name endings to read below the folder."""
    field: str = "text"
    """Which field of a JSONL or parquet record is the text."""
    tokenizer: str | None = None
    """"bytes", or the path of a `tokenizers` JSON file; default: bytes, or what the data was built with."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation; of too few for that, the last part of every document."""
    validation_path: Path | None = None
    """Folder or file of text to validate on; nothing of `path` is held out then."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A JSONL or parquet record without text: end and name it, or leave it out and count it."""
    verify: Literal["changed", "full"] = "changed"
    """At a start, check the SHA-256 of files that have changed since they were checked, or of all."""
    packed: bool = False
    """Keep documents apart: no state, position or label crosses from one into the next."""
    carry: bool = False
    """Read on where the step before ended, from the state that it left (truncated backpropagation through time)."""
    seed: int = 0
    """Order of the documents."""
    cache: Path = Path("runs/data")
    """Where token files are kept."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW with linear warm-up and cosine decay; weight decay on weight matrices only."""

    lr: float = 4e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.05
    """Final learning rate as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default: a fourteenth of the schedule, at most 2,000."""
    schedule_steps: int | None = None
    """Steps until the final learning rate, which then stays; default: --steps when the run begins. A resumed run
    keeps both."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    """Largest global gradient norm."""

    def warmup(self, num_steps: int) -> int:
        """Steps of warm-up in a schedule of `num_steps`."""
        return min(max(1, num_steps // 14), 2000) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """The layout of the processes: data parallel x sequence parallel."""

    sp: int = 2
    """Processes that share one sequence."""
    dp: int | None = None
    """Groups of them, each with its own sequences; default: as many as the processes allow."""
    data_parallel: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """What every process keeps: all (ddp), all but a share of the optimizer's state (zero1), shares of everything
    (FSDP2), weights gathered once a step (zero2) or block by block, forward and backward (zero3)."""
    dp_replicate: int = 1
    """Of zero2 and zero3: copies of the weights, each spread over dp / dp_replicate x sp processes (hybrid shard)."""
    cpu_offload: bool = False
    """Of zero2 and zero3: shares of weights, gradients and optimizer state in the host's memory."""
    recomputation: Literal["none", "selective", "full"] = "none"
    """Run blocks again in the backward pass instead of keeping their activations: all of it, or all but the exchange
    of states."""
    ffn_piece_tokens: Tokens | None = None
    """Run feed-forward layers on so many tokens at a time, and again in the backward pass; default: on all at once."""
    compile: bool = False
    """torch.compile each block, the exchange of states inside."""
    exchange: str = "auto"
    """How states travel between the processes of a sequence: see docs/guide/exchanges.md."""
    timeout_s: float = 120.0
    """Seconds after which a process that waits for another gives up."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The text generated at the end."""

    prompt: str | None = None
    """Text to continue; empty begins a document; default: the first words of the held-out text."""
    num_tokens: int = 400
    temperature: float = 0.8
    top_k: int | None = 50


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    parallel: Annotated[ParallelOptions, tyro.conf.arg(name="")] = ParallelOptions()
    sample: SampleOptions = SampleOptions()
    steps: int = 700
    """Optimizer steps in all."""
    seq_len: Tokens = 512
    """Tokens per sequence, over all its processes; 64K is 65536."""
    global_batch: int = 4
    """Sequences per step, over all processes."""
    accumulation: int = 1
    """Parts a step is cut into to save memory; the result does not change."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16; weights, states and optimizer stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where every process on this machine can have its own, else cpu."""
    seed: int = 0
    """Initial weights, order of the sequences, generated text."""
    log_every: int = 20
    """Steps between lines of output where it is not a terminal, and between comparisons of the processes."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also show the figures of metrics.jsonl there (extra `track`)."""
    profile_steps: str | None = None
    """FIRST:LAST, such as 3:5: trace these steps, one file a process in the run folder's `profile`."""
    eval_every: int = 200
    """Steps between short validations (an eighth of the final one)."""
    eval_sequences: int = 256
    """Validation sequences of the final score."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    init_from: Path | None = None
    """Folder of `lasp export` whose weights a new run starts with; its model is the run's, unless options name one."""
    run_dir: Path | None = None
    """Folder for everything this run writes; default: a new one under runs/."""

    def validate(self, num_processes: int | None = None) -> None:
        """Check every field and, where the number of processes is known, the layout. Raises ConfigError."""
        self.model.build()
        check_seed("--seed", self.seed)
        check_text("--sample.prompt", self.sample.prompt)
        check_folder("--run-dir", self.run_dir)
        check_folder("--data.cache", self.data.cache)
        self._check_counts()
        self._check_numbers()
        self._check_schedule()
        if (not_installed := missing(self.track)) is not None:
            raise ConfigError(not_installed)
        if self.profile_steps is not None and parse_range(self.profile_steps)[0] > self.steps:
            raise ConfigError(f"--profile-steps starts after the last step, {self.steps}: got {self.profile_steps}")
        if self.data.packed and self.data.carry:
            raise ConfigError(
                "--data.packed starts every sequence anew, --data.carry goes on where the step before ended: choose one"
            )
        if not self.data.suffixes:
            raise ConfigError("--data.suffixes must name at least one file name ending, such as .txt")
        self._check_layout(num_processes)

    def _check_counts(self) -> None:
        """Check numbers of things. Raises ConfigError."""
        optimizer, parallel, sample = self.optimizer, self.parallel, self.sample
        at_least_one = {
            "--steps": self.steps,
            "--seq-len": self.seq_len,
            "--global-batch": self.global_batch,
            "--accumulation": self.accumulation,
            "--log-every": self.log_every,
            "--eval-every": self.eval_every,
            "--eval-sequences": self.eval_sequences,
            "--save-every": self.save_every,
            "--keep-checkpoints": self.keep_checkpoints,
            "--optimizer.schedule-steps": self.steps if optimizer.schedule_steps is None else optimizer.schedule_steps,
            "--sp": parallel.sp,
            "--dp": parallel.dp if parallel.dp is not None else 1,
            "--dp-replicate": parallel.dp_replicate,
            "--sample.top-k": sample.top_k if sample.top_k is not None else 1,
            "--ffn-piece-tokens": parallel.ffn_piece_tokens if parallel.ffn_piece_tokens is not None else 1,
        }
        for name, count in at_least_one.items():
            if count < 1:
                raise ConfigError(f"{name} must be at least 1, got {count}")
        for name, count in (
            ("--optimizer.warmup-steps", optimizer.warmup(self.steps)),
            ("--sample.num-tokens", sample.num_tokens),
        ):
            if count < 0:
                raise ConfigError(f"{name} must not be negative, got {count}")

    def _check_numbers(self) -> None:
        """Check numbers that lie between two others. Raises ConfigError."""
        optimizer = self.optimizer
        for name, value, low, high in (
            ("--optimizer.lr", optimizer.lr, 0.0, math.inf),
            ("--optimizer.eps", optimizer.eps, 0.0, math.inf),
            ("--optimizer.clip-norm", optimizer.clip_norm, 0.0, math.inf),
            ("--timeout-s", self.parallel.timeout_s, 0.0, math.inf),
            ("--sample.temperature", self.sample.temperature, -1e-300, math.inf),
            ("--data.validation-fraction", self.data.validation_fraction, 0.0, 1.0),
        ):
            if not low < value < high:
                raise ConfigError(f"{name} must be above {max(low, 0.0)} and below {high}, got {value}")
        for name, value in (
            ("--optimizer.beta1", optimizer.beta1),
            ("--optimizer.beta2", optimizer.beta2),
            ("--optimizer.min-lr-ratio", optimizer.min_lr_ratio),
        ):
            if not 0.0 <= value <= 1.0 or (value == 1.0 and "beta" in name):
                raise ConfigError(f"{name} must be in [0, 1], betas below 1, got {value}")
        if optimizer.weight_decay < 0:
            raise ConfigError(f"--optimizer.weight-decay must not be negative, got {optimizer.weight_decay}")

    def _check_schedule(self) -> None:
        """Check how the learning rate goes up and down. Raises ConfigError."""
        optimizer = self.optimizer
        schedule = self.steps if optimizer.schedule_steps is None else optimizer.schedule_steps
        if optimizer.warmup(schedule) > schedule:
            raise ConfigError(
                f"--optimizer.warmup-steps must be at most the {schedule} steps of the schedule, got "
                f"{optimizer.warmup_steps}: the learning rate would never reach --optimizer.lr"
            )

    def _check_layout(self, num_processes: int | None) -> None:
        """Check how sequences and batches are spread. Raises ConfigError."""
        parallel = self.parallel
        if parallel.exchange not in NAMES:
            raise ConfigError(f"--exchange must be one of {', '.join(NAMES)}, got {parallel.exchange!r}")
        if self.seq_len % parallel.sp:
            raise ConfigError(
                f"--seq-len must be a multiple of --sp, got {self.seq_len} tokens over {parallel.sp} processes"
            )
        num_dp = self.num_dp(num_processes) if num_processes is not None else parallel.dp or 1
        self._check_shares(num_dp if num_processes is not None else parallel.dp)
        if self.global_batch % (num_dp * self.accumulation):
            raise ConfigError(
                f"--global-batch must be a multiple of dp x accumulation = {num_dp} x {self.accumulation}, "
                f"got {self.global_batch}"
            )

    def _check_shares(self, num_dp: int | None) -> None:
        """Check the settings by which weights are spread. Raises ConfigError."""
        parallel = self.parallel
        if parallel.data_parallel in ("ddp", "zero1"):
            for name, given in (("--dp-replicate", parallel.dp_replicate > 1), ("--cpu-offload", parallel.cpu_offload)):
                if given:
                    raise ConfigError(
                        f"{name} is of --data-parallel zero2 and zero3: with {parallel.data_parallel} every process "
                        "holds all weights on its device"
                    )
        elif num_dp == 1 and parallel.sp == 1 and parallel.cpu_offload:
            raise ConfigError("--cpu-offload is of weights spread over several processes, and there is one")
        elif num_dp is not None and num_dp % parallel.dp_replicate:
            raise ConfigError(f"--dp-replicate must divide dp = {num_dp}, got {parallel.dp_replicate}")
        elif parallel.dp_replicate > 1 and parallel.dp_replicate == num_dp and parallel.sp == 1:
            raise ConfigError(
                f"--dp-replicate {num_dp} leaves one process for each copy of the weights, and nothing to spread: "
                "lower it, or use --data-parallel ddp"
            )

    def num_dp(self, num_processes: int) -> int:
        """Data-parallel size on `num_processes` processes. Raises ConfigError if the layout does not fit."""
        sp, dp = self.parallel.sp, self.parallel.dp
        if num_processes % sp:
            raise ConfigError(
                f"{num_processes} processes cannot be split into sequence groups of {sp}: "
                f"start a multiple of {sp} processes or change --sp"
            )
        if dp is not None and dp * sp != num_processes:
            raise ConfigError(
                f"--dp {dp} x --sp {sp} needs {dp * sp} processes, but {num_processes} are running: "
                "change one of the three, or leave --dp out"
            )
        return num_processes // sp


def _read(name: str, value: Any) -> Any:
    """A word of the command line as the setting `name` takes it; any other value as it is."""
    words: dict[str, dict[str, bool | None]] = {
        "bool": {"true": True, "false": False},
        "int | None": {"none": None},
    }
    return words.get(setting_kind(name), {}).get(value.lower(), value) if isinstance(value, str) else value
