"""A run's position in its text, and what a checkpoint settles for a run that goes on from it: text, schedule, paths."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from lasp.data.store import is_store, tokenizer_of
from lasp.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from lasp.errors import CheckpointError, ConfigError
from lasp.train.checkpoint import Checkpoint, export
from lasp.train.config import TrainConfig
from lasp.train.settings_file import differences, to_dict

# What changes no loss, or is named by itself.
_UNNAMED = (
    *("parallel", "steps", "run_dir", "log_every", "eval_every", "save_every", "keep_checkpoints", "track"),
    *("profile_steps", "init_from", "model", "sample", "data", "eval_sequences", "device"),
)


class Position(NamedTuple):
    """A run's position in its text.

    Attributes:
        step: finished optimizer steps.
        sequence: sequences trained on, of the endless list that lasp.data.batches describes.
        tokens: trained on.
    """

    step: int = 0
    sequence: int = 0
    tokens: int = 0

    def at(self, step: int, config: TrainConfig) -> "Position":
        """The position after step `step`, from here on with the batches of `config`."""
        sequences = (step - self.step) * config.global_batch
        return Position(step, self.sequence + sequences, self.tokens + sequences * config.seq_len)


def position_of(state: dict[str, Any], config: TrainConfig) -> Position:
    """Position of the checkpoint with this state, in sequences of `config`: its batches may have been others.

    Sequences of another length are another list; there the run goes on after as many tokens.
    """
    data, before = state["data"], state["config"]
    sequence, length = int(data["next_sequence"]), int(before["seq_len"])
    tokens = int(data.get("tokens", sequence * length))
    if length != config.seq_len:
        sequence = -(-sequence * length // config.seq_len)
    return Position(int(state["step"]), sequence, tokens)


def settle(config: TrainConfig, state: dict[str, Any] | None) -> TrainConfig:
    """`config` with a learning rate's schedule of its own: as given, else that of the checkpoint, else over all steps.

    state: of the checkpoint to go on from. Raises ConfigError where nothing is left to do, and for what a checkpoint
    must have been written with.
    """
    options, before = config.optimizer, None
    if state is not None:
        before = state["config"]["optimizer"]
        _check(config, state)
    schedule = options.schedule_steps
    if schedule is None:
        schedule = config.steps
        if state is not None and before is not None:
            schedule = before.get("schedule_steps") or state["config"]["steps"]
    warmup = options.warmup_steps
    if warmup is None:
        warmup = before["warmup_steps"] if before is not None else options.warmup(schedule)
    optimizer = dataclasses.replace(options, schedule_steps=schedule, warmup_steps=warmup)
    return dataclasses.replace(config, optimizer=optimizer)


def _check(config: TrainConfig, state: dict[str, Any]) -> None:
    before = state["config"]
    if state["step"] > config.steps:
        raise ConfigError(
            f"nothing is left to train: the checkpoint has {state['step']} finished steps, and --steps, which counts "
            f"all of them, is {config.steps}"
        )
    if not config.data.carry:
        return
    if not before["data"].get("carry", False):
        raise ConfigError(
            "--data.carry goes on from what the steps before left behind, and the checkpoint was written "
            "without it: resume without --data.carry, or take the weights into a new run (--init-from)"
        )
    for name, option in (("global_batch", "--global-batch"), ("seq_len", "--seq-len")):
        if before[name] != getattr(config, name):
            raise ConfigError(
                f"with --data.carry every row goes on where it was: {option} must stay {before[name]}, "
                f"got {getattr(config, name)}"
            )


def tokenizer_of_run(config: TrainConfig, resumed: Checkpoint | None) -> Tokenizer:
    """The tokenizer asked for, or that of built data; of a resumed run that which it was begun with, kept in the
    checkpoint; of weights to start with theirs, kept in the export.

    Raises CheckpointError if another one is asked for.
    """
    named = config.data.tokenizer
    if resumed is None:
        asked = load_tokenizer(named) if named is not None else tokenizer_of(config.data.path)
        if config.init_from is None:
            return asked
        own = export.tokenizer(config.init_from)
        if asked.name != own.name and (named is not None or is_store(config.data.path)):
            raise CheckpointError(f"{config.init_from} was trained with tokenizer {own.name}, not {asked.name}")
        return own
    kept = read_tokenizer(resumed.folder, resumed.state["tokenizer"])
    if named is not None and record(config)["data"]["tokenizer"] != resumed.state["config"]["data"]["tokenizer"]:
        other = load_tokenizer(named)
        if other.name != kept.name:
            raise CheckpointError(f"{resumed.folder} was trained with tokenizer {kept.name}, not {other.name}")
    return kept


def changes(config: TrainConfig, state: dict[str, Any]) -> list[str]:
    """A sentence for each setting that differs from the checkpoint's and matters for what is trained."""
    before, now = dict(state["config"]), to_dict(config)
    lines = []
    if before["steps"] != config.steps:
        end = config.optimizer.schedule_steps
        lines.append(
            f"changed since the checkpoint: steps: {before['steps']} -> {config.steps}; the learning rate follows its "
            f"schedule of {end} steps (--optimizer.schedule-steps) and stays at its last value after them"
        )
    for name in ("packed", "carry"):
        before[name], now[name] = before["data"].get(name, False), now["data"][name]
    before["optimizer"] = {"schedule_steps": before["steps"]} | before["optimizer"]
    for name in _UNNAMED:
        before.pop(name, None)
        now.pop(name, None)
    if before["seq_len"] != config.seq_len:
        lines.append("the text is cut into other sequences: from here to the end of this epoch some may come again")
    return lines + [
        f"changed since the checkpoint, so the losses will differ: {line}" for line in differences(before, now)
    ]


def record(config: TrainConfig) -> dict[str, Any]:
    """The settings as config.json and checkpoints keep them: paths that mean the same from any working folder."""

    def absolute(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: absolute(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value.absolute() if isinstance(value, Path) else value

    whole: TrainConfig = absolute(config)
    if whole.data.tokenizer not in (None, "bytes"):
        data = dataclasses.replace(whole.data, tokenizer=str(Path(str(whole.data.tokenizer)).absolute()))
        whole = dataclasses.replace(whole, data=data)
    return to_dict(whole)
