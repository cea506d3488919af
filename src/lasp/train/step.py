"""One optimizer step on the global batch, the same for any layout of the processes.

gradients of  sum over labels of the global batch of loss / number of those labels
-> verdict of all processes: any NaN or infinity ends the run here, before a weight changes
-> clip by the global norm -> AdamW
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lasp.data.batches import Sequences
from lasp.errors import NumericsError
from lasp.models.causal_lm import Cache
from lasp.parallelize import ParallelModel
from lasp.train.config import TrainConfig
from lasp.train.logging.step_timer import RankStep, StepTimer
from lasp.train.optimizer import clip, learning_rate
from lasp.train.world import World


class StepResult(NamedTuple):
    loss: float
    """Mean over the labels of the global batch, nats, the same on every process."""
    grad_norm: float
    """Global, before clipping."""
    lr: float
    ranks: tuple[RankStep, ...]
    """What the step cost every process, by global rank."""
    stop: bool
    """Some process was asked to stop."""


class Stepper:
    """Runs steps by number; keeps nothing between them but weights, optimizer state and, if wanted, states carried."""

    def __init__(
        self,
        config: TrainConfig,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        sequences: Sequences,
        world: World,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.sequences, self.world = sequences, world
        self.autocast_dtype = torch.bfloat16 if config.precision == "bf16" else None
        self.names = [name for name, _ in model.module.named_parameters()]
        self.timer = StepTimer(model, world.device)
        self.carried: dict[int, Cache] = {}
        """--data.carry: what every accumulated part of the last step left behind, detached, of this process's rows."""

    def step(self, number: int, *, stop_requested: Callable[[], bool]) -> StepResult:
        """Optimizer step `number` (from 0). Raises NumericsError, on all processes, and changes no weight."""
        self.timer.start()
        targets = self.sequences.num_targets(self.config.global_batch)
        loss_sum = self.gradients(number, targets)
        bad = self.model.bad_gradients()
        first_bad = self.names.index(bad[0]) if bad else -1
        rows = self.world.gather([loss_sum, first_bad, float(stop_requested()), *self.timer.read()])
        # Added in rank order, in fp64: the printed loss is the same on every process and in every repetition.
        loss = sum(row[0] for row in rows) / targets
        self._refuse_bad(number, [row[0] for row in rows], [int(row[1]) for row in rows])
        grad_norm = clip(self.model, self.optimizer, self.config.optimizer.clip_norm).item()
        if not math.isfinite(grad_norm):
            raise NumericsError(
                f"step {number + 1}: the global gradient norm is {grad_norm} although every process's gradients "
                "are finite: their sum overflows. No weight was changed; lower --optimizer.lr or raise warm-up"
            )
        options = self.config.optimizer
        lr = learning_rate(number, options.schedule_steps or self.config.steps, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, lr, tuple(RankStep(*row[3:]) for row in rows), any(row[2] for row in rows))

    def gradients(self, number: int, targets: int) -> float:
        """Leave the gradients of step `number`, which has that many labels, in the parameters; return this process's
        sum of losses."""
        config, model = self.config, self.model
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with model.watching_gradients():
            for part in range(config.accumulation):
                tokens, labels, cu_seqlens = self._batch(number, part)
                with model.accumulating(last=part == config.accumulation - 1):
                    with torch.autocast(
                        self.world.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
                    ):
                        out = model.training(
                            tokens,
                            labels=labels,
                            cu_seqlens=cu_seqlens,
                            cache=self._carried_into(number, part),
                            output_cache=config.data.carry,
                            sp=model.sp,
                        )
                    model.mean_loss(out.loss_sum, targets).backward()
                if config.data.carry:
                    self.carried[part] = Cache(tree_map(Tensor.detach, out.cache.states), out.cache.position)
                total += out.loss_sum.detach()
        self.timer.backward_ended()
        return total.item()

    def rehearse(self) -> None:
        """A forward and backward pass whose gradients are dropped.

        DDP settles the order in which it sums gradients after its first backward pass. With that pass out of the
        way a resumed run sums in the order of the uninterrupted one, and so gets the same bits.
        """
        self.gradients(0, self.sequences.num_targets(self.config.global_batch))
        self.optimizer.zero_grad(set_to_none=True)

    def carried_tensors(self, finished: int) -> dict[str, Tensor]:
        """Tensors that this process's rows carry into step `finished`, by name, to save; the same on the processes of a
        sequence. After `rehearse`, places to load it into."""
        if self._steps_carried(finished) == 0:
            return {}
        tensors = {}
        for part, cache in self.carried.items():
            rows_per_part = self.config.global_batch // self.config.accumulation
            for place, row in enumerate(self.world.shard.rows(rows_per_part)):
                for number, leaf in enumerate(tree_leaves(cache.states)):
                    tensors[f"carried.{part * rows_per_part + row}.{number}"] = leaf[place]
        return tensors

    def resume_carried(self, finished: int) -> None:
        """Resume from what was loaded into the places of `carried_tensors`."""
        position = self._steps_carried(finished) * self.config.seq_len
        self.carried = {part: Cache(cache.states, position) for part, cache in self.carried.items()}

    def _carried_into(self, number: int, part: int) -> Cache | None:
        return self.carried[part] if self._steps_carried(number) > 0 else None

    def _steps_carried(self, number: int) -> int:
        if not self.config.data.carry:
            return 0
        return self.sequences.steps_carried(number, self.config.global_batch)

    def _batch(self, number: int, part: int) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
        shard, rows, parts = self.world.shard, self.config.global_batch, self.config.accumulation
        if self.model.sp is not None:  # ranks that read something else raise at their first exchange
            numbers = self.sequences.numbers(number, rows, shard, part=part, num_parts=parts)
            self.model.sp.begin_step(number, data=(part, numbers))
        batch = self.sequences.batch(number, rows, shard, part=part, num_parts=parts)
        return (
            torch.from_numpy(batch.tokens).to(self.world.device, non_blocking=True),
            torch.from_numpy(batch.labels).to(self.world.device, non_blocking=True),
            batch.cu_seqlens,
        )

    def _refuse_bad(self, number: int, losses: list[float], first_bad: list[int]) -> None:
        bad_losses = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        bad_gradients = [rank for rank, index in enumerate(first_bad) if index >= 0]
        if not bad_losses and not bad_gradients:
            return
        self.optimizer.zero_grad(set_to_none=True)
        # A NaN travels with the state to later ranks in the forward pass, to earlier ones in the backward pass.
        rank = bad_losses[0] if bad_losses else bad_gradients[-1]
        what = f"its loss is {losses[rank]}" if bad_losses else "its loss is finite"
        if first_bad[rank] >= 0:
            what += f", and the first bad gradient is that of {self.names[first_bad[rank]]}"
        raise NumericsError(
            f"step {number + 1}: NaN or infinity on rank {rank}: {what} "
            f"(ranks with bad losses: {bad_losses}, with bad gradients: {bad_gradients}). "
            "No weight was changed; the last checkpoint is good. Lower --optimizer.lr or raise the warm-up."
        )
