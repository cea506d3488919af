"""Sequences that go on where the step before ended, from the state it left."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import world
from test_layouts import furthest, losses
from training_runs import small_config

from lasp.data import store as token_store
from lasp.data.tokenizer import ByteTokenizer
from lasp.errors import ConfigError
from lasp.models import CausalLM
from lasp.train import step, trainer
from lasp.train.config import OptimizerOptions, TrainConfig
from lasp.train.logging.metrics import read_metrics
from lasp.train.model import model_config

STEPS = 6


def carry_config(folder: Path, **changes: object) -> TrainConfig:
    config = small_config(folder, **{"steps": STEPS, **changes})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, carry=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("carry")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[float]:
    return losses(carry_config(folder), 1)


def dropped() -> None:
    """Every step starts without memory, on the same tokens."""
    step.Stepper._carried_into = lambda self, number, part: None  # type: ignore[method-assign]


def test_every_layout_has_the_same_loss_curve(folder: Path, reference: list[float]) -> None:
    run_dir = folder / "run-2-2"
    config = carry_config(folder, dp=2, sp=2, accumulation=2, run_dir=run_dir)
    assert furthest(losses(config, 4), reference) < 1e-5
    assert furthest(losses(carry_config(folder, run_dir=folder / "dropped"), 1, before=dropped), reference) > 1e-3


def test_steps_are_pieces_of_one_long_sequence(folder: Path) -> None:
    """Losses, of weights that stay as they are, are those of every row's whole stretch, run at once."""
    still = OptimizerOptions(lr=1e-30, warmup_steps=0, weight_decay=0.0)
    config = carry_config(folder, run_dir=folder / "still", optimizer=still)
    curve = losses(config, 1)
    tokenizer = ByteTokenizer()
    options: dict[str, Any] = {"folder": config.data.path, "suffixes": (".txt",), "validation_fraction": 0.2, "seed": 0}
    stream = token_store.prepare(tokenizer=tokenizer, cache=config.data.cache, **options).train
    torch.manual_seed(0)
    model = CausalLM(model_config(config, tokenizer.vocab_size))
    part = (len(stream) - 1) // 64 // config.global_batch * 64
    nats = 0.0
    for row in range(config.global_batch):
        window = torch.from_numpy(np.asarray(stream[row * part : row * part + STEPS * 64 + 1]).astype(np.int64))[None]
        nats += model(window[:, :-1], labels=window[:, 1:]).loss_sum.item()
    assert abs(sum(curve) / STEPS / (nats / (config.global_batch * STEPS * 64)) - 1) < 1e-5


@pytest.mark.parametrize(("dp", "sp", "accumulation", "bound"), [(1, 1, 1, 0.0), (2, 2, 1, 1e-5), (1, 2, 2, 1e-5)])
def test_resumes_with_what_was_carried(
    folder: Path, reference: list[float], dp: int, sp: int, accumulation: int, bound: float
) -> None:
    """Goes on in the middle of what rows carry along, at the same and at other layouts."""
    half = folder / "half"
    if not half.exists():
        losses(carry_config(folder, run_dir=half, save_every=4), 1)
    again = carry_config(folder, run_dir=folder / f"again-{dp}-{sp}", dp=dp, sp=sp, accumulation=accumulation)

    def go_on(_rank: int) -> None:
        trainer.train(again, resume=half / "checkpoints" / "step-00000004")

    world.run(dp * sp, go_on)
    curve = [line["loss"] for line in read_metrics(again.run_dir / "metrics.jsonl") if "loss" in line]
    assert len(curve) == STEPS - 4 and furthest(curve, reference[4:]) <= bound


def test_refused(folder: Path) -> None:
    config = carry_config(folder)
    with pytest.raises(ConfigError, match=r"--data\.packed .* --data\.carry"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, packed=True)).validate()
    hybrid = dataclasses.replace(config, model=dataclasses.replace(config.model, family="hybrid", overrides={}))
    with pytest.raises(ConfigError, match="memory does not grow"):
        model_config(hybrid, 257)
