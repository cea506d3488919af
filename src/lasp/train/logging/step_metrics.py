"""A step's figures over all ranks, and which rank is slow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lasp.train.logging.step_timer import RankStep
from lasp.train.step import StepResult

# A rank is called slow when its own work takes so many times the median of the others', and so many seconds more,
# and when it is the slowest in this share of the steps: where processes share too few cores, now one is late and now
# another.
SLOW, SLOW_S, SHARE = 1.25, 0.02, 0.75


class StepFigures(NamedTuple):
    """One step, as metrics.jsonl has it; None where there is no such figure.

    Attributes:
        loss: mean over the tokens of the global batch, nats.
        grad_norm: before clipping.
        tokens: trained on so far.
        tokens_per_s: of all processes, over the whole step.
        mfu: model FLOP utilisation: FLOP of the model in its own form (lasp.analysis.flops), forward and backward,
            over what the devices' datasheets say for the time of the step.
        step_s: seconds, of the first process.
        exchanged_bytes: sent by all processes in the exchange of states; sums of gradients are not in it.
        exposed_s, hidden_s: waiting for states, and own work while they were under way, the mean over processes.
        summing_s: waiting for the sum of gradients, the mean over processes.
        slowest_s, fastest_s: own work of the rank that had the most, and the least. slowest_rank: the former.
        peak_memory_bytes: of the process that needed most.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    mfu: float | None
    step_s: float
    exchanged_bytes: int
    exposed_s: float
    hidden_s: float
    summing_s: float
    slowest_rank: int
    slowest_s: float
    fastest_s: float
    peak_memory_bytes: int


class Machine(NamedTuple):
    """The work and the speed that utilisation is counted against.

    Attributes:
        flops_per_token: of a training step.
        peak_flops: of one process's device, FLOP/s; None if unknown.
    """

    flops_per_token: float
    peak_flops: float | None


def figures_of(
    step: int, result: StepResult, *, seconds: float, tokens_per_step: int, tokens: int, machine: Machine
) -> StepFigures:
    """The figures of finished step `step` (from 1) that took `seconds`. tokens: trained on with it."""
    ranks, tokens_per_s = result.ranks, tokens_per_step / seconds
    mfu = None
    if machine.peak_flops is not None:
        mfu = tokens_per_s * machine.flops_per_token / (machine.peak_flops * len(ranks))
    own = [rank.own_s for rank in ranks]
    return StepFigures(
        step=step,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens=tokens,
        tokens_per_s=tokens_per_s,
        mfu=mfu,
        step_s=seconds,
        exchanged_bytes=int(sum(rank.sent_bytes for rank in ranks)),
        exposed_s=statistics.fmean(rank.exposed_s for rank in ranks),
        hidden_s=statistics.fmean(rank.hidden_s for rank in ranks),
        summing_s=statistics.fmean(rank.summing_s for rank in ranks),
        slowest_rank=own.index(max(own)),
        slowest_s=max(own),
        fastest_s=min(own),
        peak_memory_bytes=int(max(rank.peak_memory_bytes for rank in ranks)),
    )


def typical(steps: Sequence[Sequence[RankStep]]) -> list[RankStep]:
    """Every rank's median step: `steps[i][r]` is rank r's i-th. One hiccup does not show."""
    return [
        RankStep(*(statistics.median(values) for values in zip(*of_rank, strict=True)))
        for of_rank in zip(*steps, strict=True)
    ]


class SlowRank(NamedTuple):
    """A rank that the others wait for: seconds of its own work in a step, and the median of theirs."""

    rank: int
    own_s: float
    others_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow: its own work takes {1e3 * self.own_s:.0f} ms a step, that of the others "
            f"{1e3 * self.others_s:.0f} ms, and they wait for it"
        )

    def is_news_after(self, said: SlowRank | None) -> bool:
        """True if it is another rank than was said last, or the others wait twice as long for it."""
        return said is None or self.rank != said.rank or self.own_s - self.others_s > 2 * (said.own_s - said.others_s)


def slow_rank(steps: Sequence[Sequence[RankStep]]) -> SlowRank | None:
    """The rank whose own work takes much longer than the others' over these steps, or None."""
    own = [rank.own_s for rank in typical(steps)]
    if len(own) < 2:
        return None
    slowest = own.index(max(own))
    others = statistics.median(own[:slowest] + own[slowest + 1 :])
    often = sum(max(range(len(own)), key=lambda rank: ranks[rank].own_s) == slowest for ranks in steps)
    if own[slowest] < max(SLOW * others, others + SLOW_S) or often < SHARE * len(steps):
        return None
    return SlowRank(slowest, own[slowest], others)
