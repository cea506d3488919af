"""NaN or infinity stops every process before a weight changes, and names where it came from."""

import itertools
from pathlib import Path

import pytest
import torch
import world
from training_runs import small_config

from lasp.errors import NumericsError
from lasp.parallelize import parallelize
from lasp.train import step, trainer
from lasp.train.config import TrainConfig
from lasp.train.optimizer import build_optimizer, clip, learning_rate

VICTIM = "blocks.1.attention_norm"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_every_process_stops_and_names_the_culprit(tmp_path: Path, where: str) -> None:
    config = small_config(tmp_path, sp=2, dp=2)

    def run(rank: int) -> tuple[str, bool]:
        original = step.Stepper.step
        weights: dict[str, torch.Tensor] = {}
        steppers: list[step.Stepper] = []

        def poisoned(self: step.Stepper, number: int, **options: object) -> step.StepResult:
            if number == 3:
                steppers.append(self)
                weights.update({n: p.detach().clone() for n, p in self.model.module.named_parameters()})
                if rank == 2:
                    _poison(self, where)
            return original(self, number, **options)  # type: ignore[arg-type]

        step.Stepper.step = poisoned  # type: ignore[method-assign,assignment]
        with pytest.raises(NumericsError) as error:
            trainer.train(config)
        after = dict(steppers[0].model.module.named_parameters())
        return str(error.value), all(torch.equal(after[name], value) for name, value in weights.items())

    answers = world.run(4, run)
    messages = {message for message, _ in answers}
    assert len(messages) == 1 and all(same for _, same in answers)
    message = messages.pop()
    assert "step 4: NaN or infinity on rank 2" in message
    if where == "loss":
        assert "its loss is nan" in message
    else:
        assert "its loss is finite, and the first bad gradient is that of blocks.1." in message


def _poison(stepper: step.Stepper, where: str) -> None:
    """Break the loss, or one gradient only."""
    model = stepper.model.module
    if where == "loss":
        forward = model.forward
        model.forward = lambda *a, **k: (o := forward(*a, **k))._replace(loss_sum=o.loss_sum * float("nan"))  # type: ignore
    else:
        block = dict(model.named_modules())["blocks.1.ffn"]
        weight = next(block.parameters())
        weight.register_hook(lambda gradient: gradient * float("inf"))


def test_a_single_process_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, sp=1)
    original = step.Stepper.gradients

    def poisoned(self: step.Stepper, number: int, targets: int) -> float:
        loss = original(self, number, targets)
        return float("inf") if number == 2 else loss

    monkeypatch.setattr(step.Stepper, "gradients", poisoned)
    with pytest.raises(NumericsError, match="step 3: NaN or infinity on rank 0: its loss is inf"):
        trainer.train(config)


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    matrices, others = build_optimizer(parallelize(model, None), TrainConfig().optimizer).param_groups
    assert [p.ndim for p in matrices["params"]] == [2] and {p.ndim for p in others["params"]} == {1}
    assert matrices["weight_decay"] > 0 and others["weight_decay"] == 0


def test_gradients_are_clipped_where_the_optimizer_reads_them() -> None:
    """Compare with PyTorch's clipping; below the norm the last bit stays. The control: unclipped."""
    # Adam's first step does not see a factor.
    small = TrainConfig().optimizer
    weights: dict[tuple[str, float], torch.Tensor] = {}
    for way, max_norm in itertools.product(("here", "PyTorch's", "not"), (0.01, 1e4)):
        model = torch.nn.Linear(3, 4, bias=False)
        torch.nn.init.ones_(model.weight)
        parallel = parallelize(model, None)
        optimizer = build_optimizer(parallel, small)
        for factor in (1.0, 7.0):
            model.weight.grad = factor * torch.arange(12.0).view(4, 3)
            norm = model.weight.grad.norm()
            if way == "here":
                assert torch.equal(clip(parallel, optimizer, max_norm), norm)
            elif way == "PyTorch's":
                torch.nn.utils.clip_grad_norm_([model.weight], max_norm)
            optimizer.step()
        weights[way, max_norm] = model.weight.detach()
    assert torch.equal(weights["here", 1e4], weights["not", 1e4])
    torch.testing.assert_close(weights["here", 0.01], weights["PyTorch's", 0.01], rtol=1e-7, atol=0)
    assert (weights["not", 0.01] - weights["PyTorch's", 0.01]).abs().max() > 1e-4


def test_the_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    options = TrainConfig().optimizer
    warmup = options.warmup(500)
    assert (warmup, options.warmup(700), options.warmup(5), options.warmup(10**6)) == (35, 50, 1, 2000)
    rates = [learning_rate(number, 500, options) for number in range(500)]
    assert rates[warmup - 1] == options.lr == max(rates)
    assert rates[0] == pytest.approx(options.lr / warmup)
    assert rates[-1] == pytest.approx(options.lr * options.min_lr_ratio)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
