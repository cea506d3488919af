"""Trainer over ranks against Trainer in one process: losses, gradient norms, evaluation, weights."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import build, tokens

import lasp
import lasp.hf
from lasp.hf.training import check_same

STEPS, LENGTH = 4, 24


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Here, and not in every process that is forked."""
    import transformers.trainer  # noqa: F401


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(count, LENGTH, seed=seed)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def trainer(folder: str, batch_size: int, model: Any = None, **options: Any) -> Any:
    """A Trainer of a small model, with accumulation and clipping."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": STEPS, "gradient_accumulation_steps": 2, "logging_steps": 1, "max_grad_norm": 0.5,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "seed": 3,
    }  # fmt: skip
    model = build("mamba2", torch.float32) if model is None else model
    arguments = TrainingArguments(folder, **(settings | options))
    return Trainer(model, arguments, data_collator=collate, train_dataset=examples(40, 1), eval_dataset=examples(8, 2))


def trained(made: Any) -> tuple[list[float], list[float], float, torch.Tensor]:
    made.train()
    logs = [entry for entry in made.state.log_history if "grad_norm" in entry]
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return (
        [entry["loss"] for entry in logs], [float(entry["grad_norm"]) for entry in logs], made.evaluate()["eval_loss"],
        weights,
    )  # fmt: skip


def as_process(rank: int, size: int) -> None:
    """Variables that torchrun would set."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")


@pytest.mark.parametrize(("size", "split"), [(2, 2), (4, 2)])
def test_a_trainer_over_ranks(size: int, split: int, tmp_path: Any) -> None:
    groups = size // split

    def alone(rank: int) -> Any:
        as_process(rank, groups)
        losses, norms, evaluated, weights = trained(trainer(str(tmp_path), 2))
        return losses, norms, evaluated, weights.numpy()

    def over_ranks(rank: int) -> Any:
        as_process(rank, size)
        made = trainer(str(tmp_path), 2)
        members: list[Any] = [dist.new_group(list(range(first, first + split))) for first in range(0, size, split)]
        losses, norms, evaluated, weights = trained(lasp.hf.attach(made, lasp.SequenceParallel(members[rank // split])))
        return losses, norms, evaluated, weights.numpy()

    (losses, norms, evaluated, weights), *_ = world.run(groups, alone)
    for found in world.run(size, over_ranks):
        assert len(losses) == STEPS and found[0] == pytest.approx(losses, rel=2e-5)
        assert found[1] == pytest.approx(norms, rel=1e-4) and found[2] == pytest.approx(evaluated, rel=2e-5)
        assert torch.tensor(found[3]).allclose(torch.tensor(weights), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_tokens_across_devices": False}, "with average_tokens_across_devices=False: leave it out"),
        ({"label_smoothing_factor": 0.1}, "with label_smoothing_factor"),
        ({"accelerator_config": {"split_batches": True}}, "with split_batches"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    def work(rank: int) -> str:
        as_process(0, 1)
        made = trainer(str(tmp_path), 2, **options)
        with pytest.raises(ValueError, match=message):
            lasp.hf.attach(made, lasp.SequenceParallel(dist.group.WORLD))
        return type(made.data_collator).__name__

    assert world.run(1, work) == ["function"]


def test_evaluation_of_batches_that_are_not_full_is_refused(tmp_path: Any) -> None:
    def work(rank: int) -> None:
        as_process(0, 1)
        made = lasp.hf.attach(trainer(str(tmp_path), 3), lasp.SequenceParallel(dist.group.WORLD))
        with pytest.raises(ValueError, match="3 examples at a time, and there are 8"):
            made.evaluate()
        with pytest.raises(ValueError, match="attached already"):
            lasp.hf.attach(made, lasp.SequenceParallel(dist.group.WORLD))

    world.run(1, work)


def test_ranks_whose_weights_have_parted_are_found() -> None:
    """Weights part where gradients were not averaged; the control, that equal ones pass, is every other test."""

    def work(rank: int) -> bool:
        sp, weight = lasp.SequenceParallel(dist.group.WORLD), torch.ones(3)
        check_same([weight], sp)
        weight[1] += rank * 1e-6
        with pytest.raises(RuntimeError, match="their gradients are not averaged"):
            check_same([weight], sp)
        return True

    assert world.run(2, work) == [True, True]
