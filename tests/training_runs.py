"""A text and a configuration small enough for a training run of seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path
from typing import Any

from lasp.train.config import (
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    ParallelOptions,
    SampleOptions,
    TrainConfig,
)

# Every run draws its curve; forked processes inherit the import instead of paying for it each.
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "key_dim": 16, "value_dim": 16, "ffn_dim": 64}


def write_text(folder: Path, *, num_files: int = 24, num_words: int = 150) -> Path:
    """Files of made-up words, always the same."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefgh", k=source.randint(2, 7))) for _ in range(40)]
    for number in range(num_files):
        path = folder / f"part{number % 3}" / f"text{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(source.choices(words, k=num_words)) + f" — {number}\n", encoding="utf-8")
    return folder


def small_config(folder: Path, *, sp: int = 1, dp: int | None = None, **changes: Any) -> TrainConfig:
    """Training on `folder`/text, writing below `folder`; `changes` are fields of TrainConfig."""
    text = folder / "text"
    if not text.exists():
        write_text(text)
    config = TrainConfig(
        model=ModelOptions(overrides=SMALL),  # type: ignore[arg-type]
        data=DataOptions(path=text, validation_fraction=0.2, cache=folder / "cache"),
        optimizer=OptimizerOptions(lr=3e-3, warmup_steps=min(5, changes.get("steps", 12))),
        parallel=ParallelOptions(sp=sp, dp=dp, timeout_s=30),
        sample=SampleOptions(num_tokens=3),
        steps=12,
        seq_len=64,
        global_batch=4,
        log_every=1000,
        eval_every=1000,
        eval_sequences=8,
        save_every=1000,
        run_dir=folder / "run",
    )
    return dataclasses.replace(config, **changes)
