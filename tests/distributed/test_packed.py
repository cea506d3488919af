"""Packed documents: each gives what it gives alone, wherever the rank borders lie, and nothing leaks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exchange.simulated import run as simulate
from exchange.simulated import sequence_parallel
from problems import GATES
from tolerances import relative_error
from world import run

import lasp
from lasp.exchange import EXCHANGES

H, K, V = 2, 4, 3
KINDS = [*GATES, "delta", "gated delta", "kda"]


def inputs_of(kind: str, tokens: int, documents: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of one packed sequence, with a state for each document."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs = {"q": normal(1, tokens, H, K), "k": normal(1, tokens, H, K), "v": normal(1, tokens, H, V)}
    if kind in ("delta", "gated delta", "kda"):
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = 2 * normal(1, tokens, H).sigmoid()
    shape = {
        "constant": (H,), "scalar": (1, tokens, H), "gated delta": (1, tokens, H),
        "channel": (1, tokens, H, K), "kda": (1, tokens, H, K),
    }.get(kind)  # fmt: skip
    if shape is not None:
        inputs["g"] = -0.1 * normal(*shape).abs()
    return {**inputs, "initial_state": normal(documents, H, K, V)}


def call(inputs, *, sp=None, cu_seqlens=None, backend="torch", output_final_state=True):
    given = dict(inputs)
    tensors = [given.pop(name) for name in ("q", "k", "v")]
    options = {"output_final_state": output_final_state, "sp": sp, "cu_seqlens": cu_seqlens, "backend": backend}
    if "beta" in given:
        return lasp.delta_rule(*tensors, given["beta"], given.get("g"), initial_state=given["initial_state"], **options)
    return lasp.linear_attention(*tensors, given.get("g"), initial_state=given["initial_state"], **options)


def solve(inputs, d_o, d_final, **options) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    o, final = call(leaves, **options)
    torch.autograd.backward((o, final), (d_o, d_final))
    return {"o": o.detach(), "final": final.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def alone(inputs, d_o, d_final, bounds) -> dict[str, torch.Tensor]:
    """Every document by itself, by the reference."""
    parts = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        piece = {n: t if t.dim() == 1 else t[:, start:end] for n, t in inputs.items() if n != "initial_state"}
        piece["initial_state"] = inputs["initial_state"][index : index + 1]
        parts.append(solve(piece, d_o[:, start:end], d_final[index : index + 1], backend="reference"))
    return joined(parts)


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The results of documents as those of the packed sequence; gradients of what they share, summed."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if values[0].dim() == 1:
            whole[name] = torch.stack(values).sum(0)
        else:
            whole[name] = torch.cat(values, 0 if name in ("final", "d_initial_state") else 1)
    return whole


def local_inputs(sp, inputs) -> dict[str, torch.Tensor]:
    return {n: t if n == "initial_state" or t.dim() == 1 else sp.shard(t) for n, t in inputs.items()}


def shard_errors(sp, inputs, d_o, d_final, bounds, expected, backend="torch") -> float:
    local = local_inputs(sp, inputs)
    share = d_final * (2.0 * sp.rank + 1.0) / sp.size**2
    got = solve(local, sp.shard(d_o), share, sp=sp, cu_seqlens=bounds, backend=backend)
    worst = 0.0
    for name, value in got.items():
        reference = expected[name]
        if name == "d_initial_state":
            reference = reference if sp.rank == 0 else torch.zeros_like(reference)
        elif value.dim() == 1:
            value = sp.comm.sum(value)
        elif name != "final":
            reference = sp.shard(reference)
        worst = max(worst, relative_error(value, reference))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_one_device(kind):
    """Documents of zero, one, and many tokens, longer and shorter than a chunk, at every backend."""
    bounds = (0, 0, 1, 2, 70, 70, 199, 200)
    inputs = inputs_of(kind, 200, len(bounds) - 1)
    d_o, d_final = torch.randn(1, 200, H, V, dtype=torch.float64), torch.randn(7, H, K, V, dtype=torch.float64)
    expected = alone(inputs, d_o, d_final, bounds)
    for backend in ("torch", "reference"):
        got = solve(inputs, d_o, d_final, cu_seqlens=bounds, backend=backend)
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        assert max(errors.values()) < 1e-11, errors
    leaky = solve({**inputs, "initial_state": inputs["initial_state"][:1]}, d_o, d_final[:1])
    assert relative_error(leaky["o"], expected["o"]) > 1e-2, "the control: without boundaries it is something else"


TOKENS, RANKS = 12, 4
# Which of the 2^11 ways to cut 12 tokens are run: every 53rd (an odd step, so that every bit changes); and all of
# them, in parts that test processes can share, where that is asked for (`make exhaustive`).
NUMBER = 2 ** (TOKENS - 1)
SETS: list[Any] = [(kind, range(0, NUMBER, 53)) for kind in KINDS]
SETS += [
    pytest.param(kind, range(part, NUMBER, 4), marks=pytest.mark.exhaustive) for kind in KINDS for part in range(4)
]


def name_of(value: object) -> str:
    return f"{value[0]} by {value.step}" if isinstance(value, range) else str(value)


def bounds_of(number: int) -> tuple[int, ...]:
    """The boundaries that the bits of `number` set, of 0 .. 2^11 - 1."""
    return (0, *(t for t in range(1, TOKENS) if number >> (t - 1) & 1), TOKENS)


def cut(kind: str):
    """Inputs and output gradients of 12 tokens, and every document that any cut makes, alone by the reference.

    The tokens are the same in all cuts, and a document's states go with its start: 78 documents make all cuts.
    """
    inputs = inputs_of(kind, TOKENS, TOKENS)
    d_o, d_final = torch.randn(1, TOKENS, H, V, dtype=torch.float64), torch.randn(TOKENS, H, K, V, dtype=torch.float64)
    documents = {}
    for start, end in itertools.combinations(range(TOKENS + 1), 2):
        piece = {n: t if t.dim() == 1 else t[:, start:end] for n, t in inputs.items() if n != "initial_state"}
        piece["initial_state"] = inputs["initial_state"][start : start + 1]
        documents[start, end] = solve(piece, d_o[:, start:end], d_final[start : start + 1], backend="reference")
    return inputs, d_o, d_final, documents


def worst_of(comm_sp, sets, problem) -> float:
    """The largest error of this rank in outputs, final states and all gradients, over `sets` of boundaries.

    comm_sp: for a set's number, the ranks and the exchange that carry it.
    """
    inputs, d_o, d_final, documents = problem
    worst = 0.0
    for number in sets:
        bounds, sp = bounds_of(number), comm_sp(number)
        starts = list(bounds[:-1])
        expected = joined([documents[span] for span in itertools.pairwise(bounds)])
        here = {**inputs, "initial_state": inputs["initial_state"][starts]}
        worst = max(worst, shard_errors(sp, here, d_o, d_final[starts], bounds, expected))
    return worst


@pytest.mark.parametrize(("kind", "sets"), SETS, ids=name_of)
def test_every_set_of_boundaries(kind, sets):
    """Every boundary at, before and after every rank border, on simulated ranks, the exchanges taking turns."""
    problem = cut(kind)

    def work(comm) -> float:
        groups = [sequence_parallel(comm, name, (3, 3, 3, 3)) for name in EXCHANGES]
        return worst_of(lambda number: groups[number // sets.step % len(groups)], sets, problem)

    assert max(simulate(RANKS, work)) < 1e-12


@pytest.mark.parametrize("kind", ["scalar", "kda"])
def test_sets_of_boundaries_in_real_processes(kind):
    """A sample, with an empty shard and one of one token."""
    problem = cut(kind)

    def work(rank: int) -> float:
        groups = [
            lasp.SequenceParallel(dist.group.WORLD, exchange=name, lengths=lengths)
            for name in EXCHANGES for lengths in (None, (5, 0, 6, 1))
        ]  # fmt: skip
        return worst_of(lambda number: groups[number % len(groups)], range(0, 2048, 97), problem)

    assert max(run(RANKS, work)) < 1e-12


def test_a_boundary_misplaced_by_a_token_is_seen():
    """The control: what one rank takes for another cut is far off, in outputs and gradients."""
    problem = cut("scalar")
    inputs, d_o, d_final, documents = problem
    wrong = joined([documents[span] for span in ((0, 5), (5, 12))])

    def work(comm) -> float:
        sp = sequence_parallel(comm, "ring", (3, 3, 3, 3))
        here = {**inputs, "initial_state": inputs["initial_state"][[0, 6]]}
        return shard_errors(sp, here, d_o, d_final[[0, 6]], (0, 6, 12), wrong)

    assert max(simulate(RANKS, work)) > 1e-2


@pytest.mark.ci
@pytest.mark.parametrize(("kind", "with_final"), [("scalar", False), ("kda", True)])
def test_compiled_graphs_over_ranks(kind, with_final):
    """Gradients of documents' states are summed over ranks, also of states made within the compiled function."""
    bounds, tokens = (0, 4, 9, 12), 12
    d_o, d_final = torch.randn(1, tokens, H, V, dtype=torch.float64), torch.randn(3, H, K, V, dtype=torch.float64)
    inputs = inputs_of(kind, tokens, 3)
    expected = alone(inputs, d_o, d_final * with_final, bounds)
    assert expected["d_initial_state"][2].norm() > 0.1, "read by the second rank alone"

    def work(rank: int) -> float:
        sp = lasp.SequenceParallel(dist.group.WORLD)
        leaves = {name: t.clone().requires_grad_() for name, t in local_inputs(sp, inputs).items()}

        def attend(scale, **given):
            given["initial_state"] = scale * given["initial_state"]
            return call(given, sp=sp, cu_seqlens=bounds, output_final_state=with_final)

        o, final = torch.compile(attend, backend="aot_eager")(1.0, **leaves)
        shares = (sp.shard(d_o), d_final / sp.size)
        torch.autograd.backward((o, final) if with_final else (o,), shares if with_final else shares[:1])
        references = {name: sp.shard(expected[f"d_{name}"]) for name in leaves if name != "initial_state"}
        references["initial_state"] = expected["d_initial_state"] * (rank == 0)
        errors = [relative_error(leaf.grad, references[name]) for name, leaf in leaves.items()]
        return max(relative_error(o.detach(), sp.shard(expected["o"])), *errors)

    assert max(run(2, work)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_document(kind):
    """A document full of NaN that crosses two borders leaves every other document's outputs and gradients clean."""
    tokens, bounds = 40, (0, 7, 10, 10, 31, 33, 40)
    inputs = inputs_of(kind, tokens, 6)
    d_o, d_final = torch.ones(1, tokens, H, V, dtype=torch.float64), torch.ones(6, H, K, V, dtype=torch.float64)
    clean = solve(inputs, d_o, d_final, cu_seqlens=bounds)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 10:31] = torch.nan

    def work(rank: int) -> bool:
        good = True
        for exchange in EXCHANGES:
            sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)
            local = local_inputs(sp, inputs)
            got = solve(local, sp.shard(d_o), d_final / sp.size, sp=sp, cu_seqlens=bounds)
            here = sp.shard(((torch.arange(tokens) < 10) | (torch.arange(tokens) >= 31))[None])[0]
            of_tokens = [name for name in got if name != "d_initial_state" and got[name].shape[:1] == (1,)]
            assert {"o", "d_q", "d_k", "d_v"} <= set(of_tokens) and ("beta" not in inputs or "d_beta" in of_tokens)
            for name in of_tokens:
                good &= relative_error(got[name][:, here], sp.shard(clean[name])[:, here]) < 1e-12
            good &= bool(got["o"][:, ~here].isnan().all())
            others = [0, 1, 2, 4, 5]
            good &= relative_error(got["final"][others], clean["final"][others]) < 1e-12
            if rank == 0:
                good &= relative_error(got["d_initial_state"][others], clean["d_initial_state"][others]) < 1e-12
        return good

    assert all(run(4, work))


def test_thousands_of_tiny_documents():
    tokens = 3000
    bounds = tuple(range(tokens + 1))
    inputs = inputs_of("scalar", tokens, tokens)
    d_o, d_final = torch.ones(1, tokens, H, V, dtype=torch.float64), torch.zeros(tokens, H, K, V, dtype=torch.float64)
    got = solve(inputs, d_o, d_final, cu_seqlens=bounds)
    state = inputs["g"][0].exp()[..., None, None] * inputs["initial_state"]
    state = state + inputs["k"][0][..., None] * inputs["v"][0][..., None, :]
    assert relative_error(got["final"], state) < 1e-13
    expected = K**-0.5 * torch.einsum("thk,thkv->thv", inputs["q"][0], state)
    assert relative_error(got["o"][0], expected) < 1e-13


@pytest.mark.parametrize(
    ("batch", "bounds", "message"),
    [
        (2, (0, 8), "batch must be 1, got 2"),
        (1, (0, 7), "to the 8 tokens"),
        (1, (1, 8), "rise from 0"),
        (1, (0, 5, 4, 8), "rise from 0"),
        (1, (8,), "rise from 0"),
    ],
)
def test_messages(batch, bounds, message):
    q = torch.zeros(batch, 8, 1, 2)
    with pytest.raises(ValueError, match=message):
        lasp.linear_attention(q, q, q, cu_seqlens=torch.tensor(bounds))
