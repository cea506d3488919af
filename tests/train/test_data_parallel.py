"""Every way of keeping the weights, on every mesh, trains the model that one process trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import world
from tolerances import worst
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lasp.distributed.mesh import build_mesh
from lasp.models import CausalLM, preset
from lasp.parallelize import ParallelModel, parallelize
from lasp.train.config import OptimizerOptions
from lasp.train.optimizer import build_optimizer, clip

SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "key_dim": 8, "value_dim": 8, "ffn_dim": 48, "vocab_size": 50}
SEQUENCES, TOKENS = 4, 32
MESHES = ((1, 4), (2, 2), (4, 1))


def new_model(family: str = "transnormer") -> CausalLM:
    model = CausalLM(preset(family, "tiny", **(SMALL if family == "transnormer" else {"vocab_size": 50})))
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def batch(step: int) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(step))


def gradients(model: ParallelModel, step: int, dp: tuple[int, int] = (0, 1), parts: int = 1) -> None:
    """Makes gradients of this process's tokens, in `parts` parts; dp: which of how many sequence groups it is in."""
    text = batch(step).chunk(dp[1])[dp[0]]
    for part, rows in enumerate(text.chunk(parts)):
        tokens, labels = rows[:, :-1], rows[:, 1:]
        if model.sp is not None:
            tokens, labels = model.sp.shard(tokens), model.sp.shard(labels)
        with model.accumulating(last=part == parts - 1):
            loss_sum = model.training(tokens.contiguous(), labels=labels.contiguous(), sp=model.sp).loss_sum
            model.mean_loss(loss_sum, SEQUENCES * TOKENS).backward()


def trained(model: ParallelModel, dp: tuple[int, int] = (0, 1), *, steps: int) -> dict[str, Tensor]:
    """The whole parameters after so many steps."""
    optimizer = build_optimizer(model, OptimizerOptions(lr=2e-3))
    for step in range(steps):
        gradients(model, step, dp)
        clip(model, optimizer, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model.module.named_parameters())


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors}


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    return whole((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)


def spread(mesh: Any, data_parallel: str, **options: Any) -> ParallelModel:
    return parallelize(new_model(), mesh, data_parallel=data_parallel, timeout_s=30, **options)


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_steps_equal_one_process(steps: int) -> None:
    """Three steps in every way on one mesh and in some on the others, where weights are shared out as on that one."""
    some = {(1, 4): ("ddp", "zero3"), (4, 1): ("zero1", "zero2", "zero3, two copies")}
    reference = trained(parallelize(new_model(), None), steps=steps)
    later = trained(parallelize(new_model(), None), steps=steps + 2)

    def errors(rank: int) -> dict[tuple[object, ...], tuple[str, float]]:
        found: dict[tuple[object, ...], tuple[str, float]] = {}
        for dp, sp in MESHES:
            group = (rank // sp, dp)
            full = build_mesh(sp=sp, timeout_s=30)
            ways = {kind: (full, kind) for kind in ("ddp", "zero1", "zero2", "zero3")}
            if dp > 1:  # with one sequence group there is nothing to copy
                hybrid = build_mesh(sp=sp, dp_replicate=2, timeout_s=30)
                ways |= {f"{kind}, two copies": (hybrid, kind) for kind in ("zero2", "zero3")}
            for name in ways if steps > 3 else some.get((dp, sp), ways):
                found[name, dp, sp] = worst(trained(spread(*ways[name]), group, steps=steps), reference)
            if (dp, sp) == (2, 2):
                for kind in ("ddp", "zero3"):
                    damaged = spread(full, kind)
                    damaged.num_processes = 1  # gradients averaged, not summed
                    found[f"{kind}, damaged", dp, sp] = worst(trained(damaged, group, steps=steps + 2), later)
        return found

    for found in world.run(4, errors):
        assert len(found) == (4 * 3 + 2 * 2 if steps > 3 else 6 + 2 + 3) + 2
        for case, (name, error) in found.items():
            assert (error > 1e-3) if "damaged" in str(case[0]) else (error < 1e-5), (case, name, error)


def test_parts_of_a_batch_and_weights_on_the_host_change_nothing() -> None:
    def errors(rank: int) -> dict[str, float]:
        single = parallelize(new_model(), None)
        gradients(single, 0)
        reference = whole_gradients(single.module)
        found = {}
        mesh = build_mesh(sp=2, timeout_s=30)
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "ddp": ("ddp", {}),
            "zero2": ("zero2", {}),
            "zero3": ("zero3", {}),
            "on the host": ("zero3", {"cpu_offload": True}),
        }
        for name, (kind, options) in kinds.items():
            model = spread(mesh, kind, **options)
            gradients(model, 0, (rank // 2, 2), parts=2)
            found[name] = worst(whole_gradients(model.module), reference)[1]
        gradients(model, 1, (rank // 2, 2))
        found["a second batch on top"] = worst(whole_gradients(model.module), reference)[1]
        return found

    for found in world.run(4, errors):
        assert found.pop("a second batch on top") > 0.1
        assert max(found.values()) < 2e-6, found


def test_gradients_travel_with_the_last_part_only() -> None:
    def sent(_rank: int) -> list[bool]:
        found = []
        for kind in ("ddp", "zero2", "zero3"):
            model = spread(build_mesh(sp=1, timeout_s=30), kind)
            for last in (False, True):
                with model.accumulating(last), model.watching_gradients():
                    text = batch(0)
                    loss_sum = model.training(text[:, :-1], labels=text[:, 1:].contiguous(), sp=None).loss_sum
                    model.mean_loss(loss_sum, SEQUENCES * TOKENS).backward()
                # DDP notes gradients where it sums them; a share of a gradient is there once it was summed.
                shares = model._largest if kind == "ddp" else whole_gradients(model.module)
                found.append(bool(shares))
        return found

    assert world.run(2, sent) == [[False, True] * 3] * 2


@pytest.mark.parametrize("data_parallel", ["ddp", "zero2", "zero3"])
def test_a_bad_gradient_is_known_by_parameter_and_process(data_parallel: str) -> None:
    def bad(rank: int) -> list[str]:
        model = spread(build_mesh(sp=1, timeout_s=30), data_parallel)
        for step in range(2):
            with model.watching_gradients():
                gradients(model, step, (rank, 2), parts=2)
            assert model.bad_gradients() == []

        def damage(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: gradient * float("nan") if rank == 1 else gradient)

        model.module.get_submodule("blocks.1.ffn.up").register_forward_hook(damage)
        with model.watching_gradients():
            gradients(model, 2, (rank, 2), parts=2)
        return model.bad_gradients()

    good, found = world.run(2, bad)
    assert good == []
    assert "blocks.1.ffn.up.weight" in found
    assert "blocks.1.ffn.down.weight" not in found


def test_gathered_in_bf16_is_autocast_to_bf16() -> None:
    """Matrices are rounded where autocast rounds them, to the same bits; what must not be rounded travels whole."""
    families = ("transnormer", "linear-transformer", "mamba2", "retnet")

    def errors(_rank: int) -> tuple[dict[str, float], list[torch.dtype]]:
        mesh = build_mesh(sp=2, timeout_s=30)
        found, seen = {}, []
        for family in families:
            results = []
            for dtype in (None, torch.bfloat16):
                model = parallelize(new_model(family), mesh, data_parallel="zero3", gather_dtype=dtype)
                for block in model.module.blocks:  # type: ignore[union-attr]
                    block.register_forward_pre_hook(lambda block, _: seen.append(next(block.parameters()).dtype))
                with torch.autocast("cpu", torch.bfloat16):
                    gradients(model, 0)
                results.append(whole_gradients(model.module))
                assert {t.dtype for t in results[-1].values()} == {torch.float32}
            found[family] = worst(results[1], results[0])[1]
        return found, seen[2:4] + seen[6:8]

    for found, seen in world.run(2, errors):
        # TransNormer's first block has LRPE's angles; its second has matrices only.
        assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
        # The gains of RetNet's norms are rounded too.
        assert 1e-5 < found.pop("retnet") < 1e-2
        assert set(found.values()) == {0.0}, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel": "fsdp"}, "ddp, zero1, zero2, zero3"),
        ({"data_parallel": "ddp", "cpu_offload": True}, "cpu_offload"),
        ({"data_parallel": "zero1", "gather_dtype": torch.bfloat16}, "gather_dtype"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(new_model(), None, **options)
