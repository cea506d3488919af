"""Other places where figures go: TensorBoard and Weights & Biases, imported only when asked for (extra `track`)."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lasp import files

# Figure -> the group under which trackers show it; others go under the last.
_GROUPS = {
    "train": ("loss", "lr", "grad_norm", "tokens"),
    "speed": ("tokens_per_s", "mfu", "step_s"),
    "exchange": ("exchanged_bytes", "exposed_s", "hidden_s", "summing_s"),
    "memory": ("peak_memory_bytes",),
    "ranks": ("slowest_rank", "slowest_s", "fastest_s"),
    "validation": ("validation_bits_per_byte", "trigram_bits_per_byte"),
}


class Tracker(Protocol):
    """One tracker."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def missing(names: Sequence[str]) -> str | None:
    """The message if a tracker among `names` is not installed; None if all are."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            return f"--track {name}: {name} is not installed; pip install {name}, or leave it out"
    return None


def open_trackers(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], *, finished: int) -> list[Tracker]:
    """The trackers named. settings: shown beside the run. finished: steps of a run that is continued, else 0."""
    return [TRACKERS[name](run_dir, settings, finished) for name in names]


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """`loss` as `train/loss`, and so on."""
    group_of = {name: group for group, names in _GROUPS.items() for name in names}
    return {f"{group_of[name]}/{name}": value for name, value in values.items() if name in group_of}


class _TensorBoard:
    """Event files below `run_dir`/tensorboard; `tensorboard --logdir` on the folder of runs shows them."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], finished: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written past the checkpoint that the run continues from is dropped, as in metrics.jsonl.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=finished + 1 if finished else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in grouped(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run that stays on this machine unless WANDB_MODE says "online"; `wandb sync` sends it later."""

    name = "wandb"

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], finished: int) -> None:
        import wandb

        name = run_dir.resolve().name
        identity = run_dir / "wandb-id"
        if not identity.exists():
            files.write(identity, uuid.uuid4().hex)
        # Neither the program's output nor its source nor the repository: only what it is given.
        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True, silent=True)
        self._run = wandb.init(
            project="lasp",
            name=name,
            id=files.read(identity, 200).decode(errors="replace").strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=quiet,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(grouped(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[_TensorBoard] | type[_WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
