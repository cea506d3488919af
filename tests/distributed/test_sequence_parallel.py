"""Sequence parallelism over real processes: outputs and every gradient on every rank, against the reference in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from problems import GATES, Problem, make, solve
from tolerances import BOUNDS, relative_error
from torch.distributed.device_mesh import init_device_mesh
from world import run

import lasp
from lasp.exchange import EXCHANGES, ExchangeResult
from lasp.exchange.schedules.all_gather import AllGather
from lasp.sequence.sequence_parallel import balanced_lengths

# Equal shards where None; otherwise a share of the tokens for each rank: empty, single-token, and longer than a chunk.
SHARES: dict[int, list[tuple[int, ...] | None]] = {
    1: [None],
    2: [None, (30, 0), (0, 30), (1, 29), (10, 20)],
    3: [None, (0, 0, 30), (28, 1, 1), (1, 0, 29)],
    4: [None, (0, 30, 0, 0), (5, 1, 0, 24), (29, 0, 0, 1), (9, 9, 9, 3)],
}


def lengths_of(share: tuple[int, ...] | None, tokens: int) -> tuple[int, ...] | None:
    if share is None:
        return None
    cut = [tokens * n // 30 for n in itertools.accumulate(share)]
    return tuple(b - a for a, b in zip([0, *cut[:-1]], cut, strict=True))


def errors(
    sp: lasp.SequenceParallel,
    problem: Problem,
    expected: dict,
    backend: str = "torch",
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> dict[str, float]:
    """This rank's errors: its shard of o and of every gradient, its share of the sums, the whole final state."""
    leaves = {}
    for name, tensor in problem.inputs.items():
        if tensor is not None:
            whole = name == "initial_state" or tensor.dim() == 1
            leaf = tensor if whole else sp.shard(tensor)
            leaves[name] = leaf.to(device, dtype, copy=True).requires_grad_()
    o, final = lasp.linear_attention(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("g"), initial_state=leaves["initial_state"],
        output_final_state=True, causal=problem.causal, sp=sp, backend=backend,
    )  # fmt: skip
    # Every rank holds a different share of the final state's gradient; only their sum is the problem's.
    share = problem.d_final * (2.0 * sp.rank + 1.0) / sp.size**2
    torch.autograd.backward((o, final), (sp.shard(problem.d_o).to(o), share.to(final)))
    got = {"o": o, "final_state": final, **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}
    result = {}
    for name, value in got.items():
        reference = expected[name]
        if name == "d_initial_state" and sp.rank > 0:
            reference = torch.zeros_like(reference)
        elif name == "d_g" and value.dim() == 1:
            dist.all_reduce(value)
        elif name not in ("final_state", "d_initial_state"):
            reference = sp.shard(reference)
        result[name] = relative_error(value.cpu(), reference)
    return result


@pytest.mark.parametrize("size", [1, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in (2, 4)), 3])
def test_equals_one_device(size):
    """Every schedule, recurrence and way to cut the sequence: 1e-12 on every rank.

    Of three ranks every pair of them, with every second of the third, which is another for each pair: simulated ranks
    meet all (tests/exchange).
    """
    cases = []
    for gate, causal in [*((gate, True) for gate in GATES), ("none", False)]:
        for tokens, slow in ((12 * 3, 0.02), (12 * 17, 1e-4)):
            problem = make(gate, tokens=tokens, heads=1, value_heads=2, keys=4, values=3, slow=slow, causal=causal)
            cases.append(
                (f"{gate} T={tokens} causal={causal}", problem, solve(problem, "reference" if causal else "torch"))
            )

    def work(rank: int) -> list[tuple[str, float]]:
        failures = []
        for number, exchange in enumerate(EXCHANGES):
            base = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            pairs = itertools.product(enumerate(cases), enumerate(SHARES[size]))
            for (i, (name, problem, expected)), (j, share) in pairs:
                if size == 3 and (number + i + i // 2 + j) % 2:
                    continue
                sp = base.with_lengths(lengths_of(share, problem.d_o.shape[1]))
                for tensor, error in errors(sp, problem, expected).items():
                    if not error < BOUNDS[torch.float64]:
                        failures.append((f"{exchange} {name} {share} {tensor}", error))
        return failures

    for rank, failures in enumerate(run(size, work)):
        assert not failures, (rank, failures[:5])


def test_reference_backend_crosses_ranks_too():
    problem = make("channel", tokens=9)
    expected = solve(problem, "reference")

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(4, 0, 5), exchange="ring")
        return max(errors(sp, problem, expected, "reference").values())

    assert max(run(3, work)) < BOUNDS[torch.float64]


class Broken(AllGather):
    """An exchange with a mistake in it."""

    name = "broken"

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def begin(self, comm, summary, initial, *, reverse, want_total):
        mistake = self.mistake
        if mistake == "no transition":
            summary = type(summary)(summary.transition.identity(summary.state), summary.state)
        if mistake == "wrong direction":
            reverse = not reverse
        pending = super().begin(comm, summary, initial, reverse=reverse, want_total=want_total)

        class Wrong:
            def wait(self):
                entering, total = pending.wait()
                if mistake == "dropped":
                    entering = torch.zeros_like(entering)
                if mistake == "dropped backward" and reverse:
                    entering = torch.zeros_like(entering)
                if mistake == "off by one":
                    entering = summary.apply(entering)
                return ExchangeResult(entering, total)

        return Wrong()


@pytest.mark.parametrize("mistake", ["dropped", "dropped backward", "no transition", "wrong direction", "off by one"])
def test_mistakes_are_seen(mistake):
    """The control: each mistake an exchange can make fails the same comparison, by far."""
    problem = make("scalar", tokens=24)
    expected = solve(problem, "reference")

    def work(rank: int) -> float:
        return max(
            errors(lasp.SequenceParallel(dist.group.WORLD, exchange=Broken(mistake)), problem, expected).values()
        )

    assert max(run(3, work)) > 1e-3


def test_groups_side_by_side():
    """Data parallel x sequence parallel: each group of a 2 x 2 mesh solves a problem of its own."""
    problems = [make("scalar", tokens=20, seed=seed) for seed in (1, 2)]
    expected = [solve(problem, "reference") for problem in problems]

    def work(rank: int) -> float:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "sp"))
        replica = mesh.get_local_rank("dp_replicate")
        worst = 0.0
        for exchange in EXCHANGES:
            sp = lasp.SequenceParallel(mesh["sp"], lengths=(13, 7), exchange=exchange)
            worst = max(worst, *errors(sp, problems[replica], expected[replica]).values())
        return worst

    assert max(run(4, work)) < BOUNDS[torch.float64]


def test_denominator_crosses_ranks():
    """The Linear Transformer's normalisation, whose denominator is part of the state."""
    problem = make("none", tokens=21)
    q, k, v = (problem.inputs[name] for name in "qkv")
    q, k = q.exp(), k.exp()
    expected, _ = lasp.normalized_linear_attention(q, k, v)

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=balanced_lengths(21, 4))
        o, _ = lasp.normalized_linear_attention(*(sp.shard(t) for t in (q, k, v)), sp=sp)
        return relative_error(o, sp.shard(expected))

    assert max(run(4, work)) < 1e-13


def test_later_ranks_are_not_seen():
    """A last rank full of NaN leaves all earlier ranks' outputs bit for bit as they were."""
    problem = make("constant", tokens=30)

    def work(rank: int) -> list[bool]:
        same = []
        for exchange in EXCHANGES:
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            q, k, v = (sp.shard(problem.inputs[name]) for name in "qkv")
            clean, _ = lasp.linear_attention(q, k, v, problem.inputs["g"], sp=sp)
            if rank == 2:
                q, k, v = (torch.full_like(t, torch.nan) for t in (q, k, v))
            poisoned, _ = lasp.linear_attention(q, k, v, problem.inputs["g"], sp=sp)
            same.append(torch.equal(clean, poisoned))
        return same

    assert run(3, work) == [[True] * len(EXCHANGES), [True] * len(EXCHANGES), [False] * len(EXCHANGES)]
