"""A checkpoint belongs to the model, not to the layout that wrote it: every layout goes on from every other's."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import world
from test_data_parallel import MESHES, SEQUENCES, TOKENS, batch, new_model, spread
from torch import nn
from torch.distributed.fsdp import fully_shard

from lasp.data.batches import Shard
from lasp.distributed.comm import Comm
from lasp.distributed.groups import new_group
from lasp.distributed.mesh import build_mesh
from lasp.parallelize import ParallelModel, parallelize
from lasp.train import checkpoint
from lasp.train.checkpoint import shards
from lasp.train.config import OptimizerOptions
from lasp.train.optimizer import build_optimizer, clip
from lasp.train.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, Shard())
CONFIG = {"kind": "tiny"}
BEFORE, AFTER = 3, 2
"""Steps before the checkpoint, and after it: the second of them needs the optimizer's state too."""


class Run(NamedTuple):
    """A model on one layout. Making one twice gives the same; training changes it."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    world: World
    dp: tuple[int, int] = (0, 1)

    def steps(self, first: int, count: int) -> list[float]:
        """The loss, over all processes, of each of these steps."""
        return [self.step(number) for number in range(first, first + count)]

    def step(self, number: int) -> float:
        model, text = self.model, batch(number).chunk(self.dp[1])[self.dp[0]]
        tokens, labels = text[:, :-1], text[:, 1:]
        if model.sp is not None:
            tokens, labels = model.sp.shard(tokens), model.sp.shard(labels)
        loss_sum = model.training(tokens.contiguous(), labels=labels.contiguous(), sp=model.sp).loss_sum
        model.mean_loss(loss_sum, SEQUENCES * TOKENS).backward()
        clip(model, self.optimizer, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(row[0] for row in self.world.gather([loss_sum.item()])) / (SEQUENCES * TOKENS)

    def save(self, root: Path, step: int) -> list[float]:
        """The losses that follow, while the files are written: they must not notice that training goes on."""
        saver = shards.Saver(root, self.world, keep=2)
        assert saver.start(self.model.module, self.optimizer, {"step": step, "model_config": CONFIG}) is None
        losses = self.steps(step, AFTER)
        assert saver.finish() is None
        return losses

    def load(self, root: Path) -> None:
        found = checkpoint.find(root, report=pytest.fail, world=self.world)
        shards.load(found, self.model.module, CONFIG, optimizer=self.optimizer, world=self.world)


def run_of(model: ParallelModel, world: World, dp: tuple[int, int] = (0, 1)) -> Run:
    return Run(model, build_optimizer(model, OptimizerOptions(lr=2e-2)), world, dp)


SAMPLE = (
    "zero3 x 1, dp 1, sp 4",
    "ddp x 1, dp 2, sp 2",
    "zero3 x 2, dp 2, sp 2",
    "zero1 x 1, dp 4, sp 1",
)


def layouts(rank: int, names: Collection[str]) -> dict[str, Run]:
    """Layouts of `names`, or one on every mesh with every way of keeping the weights, on four processes; collective."""
    control = Comm(new_group(backend="gloo"), 30)
    everyone = World(rank, 4, CPU, Shard(), control=control, files=new_group(backend="gloo"))
    found = {}
    for dp, sp in MESHES:
        for copies, kind in [(1, "ddp"), (1, "zero1"), (1, "zero2"), (1, "zero3"), (2, "zero3")]:
            if dp % copies == 0:
                name = f"{kind} x {copies}, dp {dp}, sp {sp}"
                if name in names or not names:
                    mesh = build_mesh(sp=sp, dp_replicate=copies, timeout_s=30)
                    found[name] = run_of(spread(mesh, kind), everyone, (rank // sp, dp))
    return found


@pytest.mark.parametrize(
    ("names", "fraction", "num_layouts", "num_resumed"),
    [pytest.param(SAMPLE, 2, 5, 20, marks=pytest.mark.ci), pytest.param((), 8, 15, 60, marks=pytest.mark.exhaustive)],
)
def test_every_layout_goes_on_from_the_others_checkpoints(
    tmp_path: Path, names: tuple[str, ...], fraction: int, num_layouts: int, num_resumed: int
) -> None:
    """One process reads every layout's, every layout reads one process's and a fraction of the others'; and its own,
    with the same bits.
    """

    def losses(rank: int) -> tuple[dict[str, list[float]], dict[tuple[str, str], list[float]]]:
        runs, went_on, resumed = layouts(rank, names), {}, {}
        for name, run in runs.items():
            run.steps(0, BEFORE)
            went_on[name] = run.save(tmp_path / name, BEFORE)
            run.load(tmp_path / name)
            resumed[name, name] = run.steps(BEFORE, AFTER)
        single = run_of(parallelize(new_model(), None), ALONE)
        if rank == 0:
            single.steps(0, BEFORE)
            went_on["one process"] = single.save(tmp_path / "one process", BEFORE)
            for source in [*runs, "one process"]:
                single.load(tmp_path / source)
                resumed[source, "one process"] = single.steps(BEFORE, AFTER)
        dist.barrier()
        for (i, source), (j, name) in itertools.product(enumerate(["one process", *runs]), enumerate(runs)):
            if i == 0 or (i + j) % fraction == 0:
                runs[name].load(tmp_path / source)
                resumed[source, name] = runs[name].steps(BEFORE, AFTER)
        return went_on, resumed

    uninterrupted = run_of(parallelize(new_model(), None), ALONE).steps(0, BEFORE + AFTER)[BEFORE:]
    went_on, resumed = world.run(4, losses)[0]
    assert len(went_on) == num_layouts and len(resumed) > num_resumed
    for case, found in resumed.items():
        assert found == pytest.approx(uninterrupted, rel=1e-5), case
    for name, losses_then in went_on.items():
        assert resumed[name, name] == losses_then


def test_a_weight_with_fewer_rows_than_processes(tmp_path: Path) -> None:
    """Some processes hold none of it, and write nothing of it."""

    def new(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(width)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def load_elsewhere(rank: int) -> float:
        everyone = World(rank, 4, CPU, Shard(), control=Comm(new_group(), 30), files=new_group())
        module, optimizer = new(1)
        fully_shard(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        saver = shards.Saver(tmp_path, everyone, keep=1)
        assert saver.start(module, optimizer, {"step": 1, "model_config": CONFIG}) is saver.finish() is None
        whole = [p.full_tensor() for p in module.parameters()]  # type: ignore[attr-defined]
        found = checkpoint.find(tmp_path, report=pytest.fail, world=everyone)
        for spread_again in (False, True):
            other, other_optimizer = new(2)
            if spread_again:
                fully_shard(other)
                other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
            shards.load(found, other, CONFIG, optimizer=other_optimizer, world=everyone)
            for ours, theirs in zip(whole, other.parameters(), strict=True):
                there = theirs.full_tensor() if spread_again else theirs  # type: ignore[attr-defined]
                assert torch.equal(ours, there)
                moment = other_optimizer.state[theirs]["exp_avg"]
                moment = moment.full_tensor() if spread_again else moment
                assert moment.abs().max() > 0
        return 0.0

    world.run(4, load_elsewhere)
