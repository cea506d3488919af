"""Trainer over ranks against Trainer in one process: losses, gradient norms, evaluation, weights.

In fp64. In fp32 losses agree as well, to 4e-7 over 20 steps; but gradient norms only to 3e-5, since Adam divides each
gradient by its own size, and those that are all rounding differ by their sign.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import world
from hf.small_models import build, exactly, tokens
from hf.trainer.processes import as_process, groups_of
from hf.trainer.with_lora import lora

import lasp
import lasp.hf
from lasp.hf.training import check_same

STEPS, LENGTH = 20, 24


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Here, and not in every process that is forked."""
    import transformers.trainer  # noqa: F401


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(count, LENGTH, seed=seed)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "gradient_accumulation_steps": 2, "logging_steps": 1, "max_grad_norm": 0.5,
    "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_steps": STEPS // 2, "disable_tqdm": True,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "seed": 3,
}  # fmt: skip


def trainer(folder: Path, model: Any = None, *, of_evaluation: int = 8, **options: Any) -> Any:
    """A Trainer of a small model, with accumulation and clipping."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), **(SETTINGS | options))
    # accelerate has cpu:0, to which 5.17 loads no optimizer.
    vars(arguments)["_setup_devices"] = torch.device("cpu")
    model = build("mamba2") if model is None else model
    data = {"train_dataset": examples(100, 1), "eval_dataset": examples(of_evaluation, 2)}
    return Trainer(model, arguments, data_collator=collate, **data)


class Trained(NamedTuple):
    """Holds what a Trainer reports of every step, and of the model in the end."""

    losses: list[float]
    norms: list[float]
    evaluated: float
    weights: Any
    others: list[float]


def trained(made: Any, *others: str, checkpoint: str | None = None) -> Trained:
    """others: names of what else is logged."""
    with exactly():
        made.train(resume_from_checkpoint=checkpoint)
        evaluated = made.evaluate()["eval_loss"]
    logs = [entry for entry in made.state.log_history if "grad_norm" in entry]
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad]).numpy()
    return Trained(
        [entry["loss"] for entry in logs], [float(entry["grad_norm"]) for entry in logs], evaluated, weights,
        [entry[name] for name in others for entry in logs],
    )  # fmt: skip


class Bounds(NamedTuple):
    """Relative errors; of weights absolute ones."""

    losses: float = 1e-6
    norms: float = 1e-9
    weights: float = 1e-9


def compare(
    size: int,
    split: int,
    made: Callable[[int], Any],
    whole: Callable[[], Any],
    *others: str,
    bounds: Bounds = Bounds(),  # noqa: B008 - a constant
) -> None:
    """Train over `size` ranks, `split` to a group, `made(rank)`, and in as many processes as groups `whole()`."""

    def alone(rank: int) -> Trained:
        as_process(rank, size // split)
        return trained(whole(), *others)

    def over_ranks(rank: int) -> Trained:
        as_process(rank, size)
        trainer = made(rank)
        return trained(lasp.hf.attach(trainer, groups_of(split)), *others)

    expected = world.run(size // split, alone, deadline_s=400)[0]
    assert len(expected.losses) == STEPS
    for found in world.run(size, over_ranks, deadline_s=400):
        assert found.losses == pytest.approx(expected.losses, rel=bounds.losses)
        assert found.norms == pytest.approx(expected.norms, rel=bounds.norms)
        assert found.evaluated == pytest.approx(expected.evaluated, rel=bounds.losses)
        assert found.others == pytest.approx(expected.others, rel=bounds.losses)
        assert torch.tensor(found.weights).allclose(torch.tensor(expected.weights), atol=bounds.weights)


@pytest.mark.parametrize(("size", "split", "with_lora"), [(2, 2, False), (4, 2, True)])
def test_a_trainer_over_ranks(size: int, split: int, with_lora: bool, tmp_path: Path) -> None:
    """Six examples of evaluation: accelerate takes half of the last batch's losses for filled up."""

    def made(rank: int = 0) -> Any:
        model = lora(build("qwen3_next")) if with_lora else None
        return trainer(tmp_path, model, of_evaluation=8 if with_lora else 6, save_strategy="no")

    compare(size, split, made, made)


def test_a_resumed_run_continues(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Trained, Trained]:
        as_process(rank, 2)
        sp = groups_of(2)
        whole = trained(lasp.hf.attach(trainer(tmp_path), sp))
        again = lasp.hf.attach(trainer(tmp_path, build("mamba2").apply(_forget)), sp)
        return whole, trained(again, checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))

    for whole, again in world.run(2, work, deadline_s=400):
        assert again.losses == whole.losses and again.norms == whole.norms and len(again.losses) == STEPS
        assert (again.weights == whole.weights).all()


def _forget(module: Any) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_tokens_across_devices": False}, "with average_tokens_across_devices=False: leave it out"),
        ({"label_smoothing_factor": 0.1}, "with label_smoothing_factor"),
        ({"accelerator_config": {"split_batches": True}}, "with split_batches"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        as_process(0, 1)
        made = trainer(tmp_path, **options)
        with pytest.raises(ValueError, match=message):
            lasp.hf.attach(made, lasp.SequenceParallel(dist.group.WORLD))
        return type(made.data_collator).__name__

    assert world.run(1, work) == ["function"]


def test_evaluation_of_batches_that_are_not_full_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        as_process(0, 1)
        made = trainer(tmp_path, per_device_eval_batch_size=3)
        lasp.hf.attach(made, lasp.SequenceParallel(dist.group.WORLD))
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
