"""A run as its folder tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lasp.errors import ConfigError
from lasp.files import read, read_json
from lasp.train.logging.metrics import read_metrics


class LoadedRun(NamedTuple):
    """A finished run, from which the page is made.

    Attributes:
        folder: of the run.
        config: the settings, as config.json has them. about: run.json, see lasp.train.logging.run_info.
        steps, ranks, validations: lines of metrics.jsonl by kind, see lasp.train.logging.run_logger.
        trigram: bits per byte of the byte 3-gram model, if it was scored.
        sample: the text generated at the end, or "".
    """

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    steps: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    trigram: float | None
    sample: str

    @property
    def finished(self) -> int:
        return int(self.steps[-1]["step"])

    @property
    def name(self) -> str:
        return f"{self.config['model']['family']}-{self.config['model']['size']}"


def load(folder: Path) -> LoadedRun:
    """Read a run's folder; the run may be going on. Raises ConfigError if it holds no run with a finished step."""
    paths = {name: folder / name for name in ("config.json", "run.json", "metrics.jsonl")}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise ConfigError(f"{folder} is not a run folder of this version of lasp train: it has no {missing[0]}")
    try:
        config, about = (read_json(paths[name]) for name in ("config.json", "run.json"))
        lines = read_metrics(paths["metrics.jsonl"])
        sample = folder / "sample.txt"
        text = read(sample) if sample.exists() else b""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ConfigError(f"{folder}: no step has finished yet")
    return LoadedRun(
        folder=folder,
        config=config,
        about=about,
        steps=steps,
        ranks=[line for line in lines if "ranks" in line],
        validations=[line for line in lines if "validation_bits_per_byte" in line],
        trigram=next((line["trigram_bits_per_byte"] for line in lines if "trigram_bits_per_byte" in line), None),
        sample=text.decode(errors="replace"),
    )
