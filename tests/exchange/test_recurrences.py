"""Every recurrence by every schedule on up to 8 ranks, in one process: outputs, final state and all gradients."""

from __future__ import annotations

import random
from functools import cache, partial
from typing import Any

import pytest
import torch
from problems import GATES, make
from simulated import run, sequence_parallel
from tolerances import relative_error

import lasp
from lasp.exchange import EXCHANGES, ExchangeResult, Hierarchical, Pipelined, resolve
from lasp.exchange.schedules.doubling import Doubling

SIZES = (1, 2, 3, 4, 5, 8)
SCHEDULES = {
    **dict.fromkeys((*EXCHANGES, "auto")),
    "pipelined in 3 blocks": Pipelined(blocks=3),
    "hierarchical by 3": Hierarchical(ranks_per_node=3),
}
TOKENS = 19
DELTA_GATES = ("none", "scalar", "channel")


def ragged(size: int, tokens: int) -> tuple[int, ...]:
    """Shards of any length: some empty, some of one token, none like its neighbour by rule."""
    draw = random.Random(size)
    cuts = sorted(draw.choices(range(tokens + 1), k=size - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True))


def delta_inputs(gate: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(1, TOKENS, 2, 4),
        "k": torch.nn.functional.normalize(normal(1, TOKENS, 2, 4), dim=-1),
        "v": normal(1, TOKENS, 2, 3),
        "beta": 2 * normal(1, TOKENS, 2).sigmoid(),
        "initial_state": normal(1, 2, 4, 3),
        "d_o": normal(1, TOKENS, 2, 3),
        "d_final": normal(1, 2, 4, 3),
    }
    shape = {"none": None, "scalar": (1, TOKENS, 2), "channel": (1, TOKENS, 2, 4)}[gate]
    if shape is not None:
        inputs["g"] = -0.05 * normal(*shape).abs()
    return inputs


def problems() -> dict[str, tuple[dict[str, torch.Tensor], bool]]:
    """Inputs and output gradients by name, and whether outputs see only the past."""
    result = {}
    for gate, causal in [*((gate, True) for gate in GATES), ("none", False)]:
        problem = make(gate, batch=1, tokens=TOKENS, value_heads=4, keys=4, values=3, slow=0.05, causal=causal)
        inputs = {name: t for name, t in problem.inputs.items() if t is not None}
        name = f"linear attention, gate {gate}, causal {causal}"
        result[name] = ({**inputs, "d_o": problem.d_o, "d_final": problem.d_final}, causal)
    for gate in DELTA_GATES:
        result[f"delta rule, gate {gate}"] = (delta_inputs(gate), True)
    return result


PROBLEMS = problems()


def compute(name: str, sp: lasp.SequenceParallel | None, backend: str = "auto") -> dict[str, torch.Tensor]:
    """Outputs, final state and gradients of this rank's part."""
    inputs, causal = PROBLEMS[name]
    d_o, d_final = inputs["d_o"], inputs["d_final"]
    leaves = {}
    for key, tensor in inputs.items():
        if not key.startswith("d_"):
            whole = sp is None or key == "initial_state" or tensor.dim() == 1
            leaves[key] = (tensor if whole else sp.shard(tensor)).clone().requires_grad_()
    if sp is not None:  # every rank has a share of its own of the final state's gradient
        d_o, d_final = sp.shard(d_o), d_final * (2.0 * sp.rank + 1.0) / sp.size**2
    keywords: dict[str, Any] = {
        "initial_state": leaves["initial_state"],
        "output_final_state": True,
        "sp": sp,
        "backend": backend,
    }
    if "beta" in leaves:
        o, final = lasp.delta_rule(*(leaves.get(key) for key in ("q", "k", "v", "beta", "g")), **keywords)
    else:
        o, final = lasp.linear_attention(*(leaves.get(key) for key in "qkvg"), causal=causal, **keywords)
    torch.autograd.backward((o, final), (d_o, d_final))
    return {"o": o.detach(), "final": final.detach(), **{f"d_{key}": leaf.grad for key, leaf in leaves.items()}}


@cache
def solution(name: str) -> dict[str, torch.Tensor]:
    """Results of one device, token by token where there is an order."""
    return compute(name, None, "reference" if PROBLEMS[name][1] else "torch")


def whole(parts: list[dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    """The ranks' results as one device's: shards joined, shares summed, what all have from the last."""
    values = [part[key] for part in parts]
    if key == "d_initial_state" or values[0].dim() == 1:
        return sum(values[1:], values[0])
    return values[-1] if key == "final" else torch.cat(values, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_one_device(name, schedule):
    """1e-12 on 1 to 8 ranks with ragged shards, whichever rank runs when."""
    expected = solution(name)
    exchange = SCHEDULES[schedule] or schedule
    for size in SIZES:
        lengths = ragged(size, TOKENS)
        parts = run(size, lambda comm, lengths=lengths: compute(name, sequence_parallel(comm, exchange, lengths)))
        for key, reference in expected.items():
            error = relative_error(whole(parts, key), reference)
            assert error < 1e-12, (size, lengths, key, error)
        assert all(torch.equal(part["final"], parts[0]["final"]) for part in parts), "one final state everywhere"


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("family", ["linear attention", "delta rule"])
def test_packed_documents(family, gate):
    """Documents across ranks, with edges at ranks' edges, empty ones, one of one token: transitions that are zero."""
    causal = ", causal True" if family == "linear attention" else ""
    inputs, _ = PROBLEMS[f"{family}, gate {gate}{causal}"]
    documents = torch.tensor([0, 0, 4, 5, 5, 13, TOKENS])

    def solve(sp, backend="torch"):
        leaves = {
            key: (tensor if sp is None else sp.shard(tensor)).clone().requires_grad_()
            for key, tensor in inputs.items()
            if not key.startswith("d_") and key != "initial_state"
        }
        operator = lasp.linear_attention if family == "linear attention" else lasp.delta_rule
        names = ("q", "k", "v", "g") if family == "linear attention" else ("q", "k", "v", "beta", "g")
        o, _ = operator(*(leaves.get(key) for key in names), cu_seqlens=documents, sp=sp, backend=backend)
        o.backward(inputs["d_o"] if sp is None else sp.shard(inputs["d_o"]))
        return {"o": o.detach(), **{key: leaf.grad for key, leaf in leaves.items()}}

    expected = solve(None)
    for schedule, exchange in SCHEDULES.items():
        of_torch = (("torch", n) for n in ((4, 1, 8, 6), (0, 3, 0, 12, 4), (3, 2, 2, 3, 2, 3, 2, 2)))
        for backend, lengths in (*of_torch, ("reference", (10, 0, 9))):
            carried = partial(sequence_parallel, exchange=exchange or schedule, lengths=lengths)
            parts = run(len(lengths), lambda comm, sp=carried, backend=backend: solve(sp(comm), backend))
            for key, reference in expected.items():
                assert relative_error(whole(parts, key), reference) < 1e-12, (schedule, backend, lengths, key)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_decay_of_zero_over_ranks_without_tokens(backend):
    """A logarithm of -inf, of all heads but one, times no tokens: every token sees itself alone."""
    inputs, _ = PROBLEMS["linear attention, gate constant, causal True"]
    q, k, v, start = (inputs[name] for name in ("q", "k", "v", "initial_state"))
    g = torch.full((4,), -torch.inf, dtype=torch.float64)

    def solve(sp, tokens=TOKENS):
        x = [t[:, :tokens] if sp is None else sp.shard(t) for t in (q, k, v)]
        leaves = [t.clone().requires_grad_() for t in (*x, start)]
        o, final = lasp.linear_attention(
            *leaves[:3], g, initial_state=leaves[3], output_final_state=True, scale=1.0, sp=sp, backend=backend
        )
        d_final = inputs["d_final"] if sp is None else inputs["d_final"] / sp.size
        gradients = torch.autograd.grad((o, final), leaves, (torch.ones_like(o), d_final))
        return dict(zip(("o", "final", "d_q", "d_k", "d_v", "d_initial_state"), (o, final, *gradients), strict=True))

    expected = solve(None)
    wide = k.repeat_interleave(2, 2)
    alone = (q.repeat_interleave(2, 2) * wide).sum(-1, keepdim=True) * v
    assert relative_error(expected["o"], alone) < 1e-12
    assert relative_error(expected["final"], wide[:, -1, :, :, None] * v[:, -1, :, None]) < 1e-12
    assert torch.equal(solve(None, tokens=0)["final"], start)
    for schedule, exchange in SCHEDULES.items():
        carried = partial(sequence_parallel, exchange=exchange or schedule, lengths=(0, 7, 0, 12, 0))
        parts = run(5, lambda comm, sp=carried: solve(sp(comm)))
        for key, reference in expected.items():
            assert relative_error(whole(parts, key), reference) < 1e-12, (schedule, key)


class Wrong(Doubling):
    """A schedule that carries, backward only, what another head has."""

    name = "wrong"

    def begin(self, comm, summary, initial, *, reverse, want_total):
        pending = super().begin(comm, summary, initial, reverse=reverse, want_total=want_total)

        class Mixed:
            def wait(_):
                entering, total = pending.wait()
                return ExchangeResult(entering.roll(1, 1) if reverse else entering, total)

        return Mixed()


def test_the_comparison_can_fail():
    name = "delta rule, gate scalar"
    expected = compute(name, None)
    parts = run(3, lambda comm: compute(name, sequence_parallel(comm, Wrong(), (6, 6, 7))))
    assert relative_error(whole(parts, "o"), expected["o"]) < 1e-12
    assert relative_error(whole(parts, "d_k"), expected["d_k"]) > 1e-2


def test_names_tell_schedules_apart():
    """The name is what ranks compare: it holds every parameter that changes what is sent."""
    names = {
        exchange.name
        for exchange in (
            *(resolve(name, 2) for name in (*EXCHANGES, "auto")),
            *(Pipelined(blocks=blocks) for blocks in (3, 4)),
            *(Hierarchical(count, EXCHANGES[across]()) for count in (2, 3) for across in ("ring", "doubling")),
        )
    }
    assert len(names) == len(EXCHANGES) + 7


@pytest.mark.parametrize("gate", ["constant", "scalar", "channel", "scalar of a delta rule"])
def test_slow_decays_keep_their_digits_over_long_sequences(gate):
    """One write, read at the end: 1e-5 in fp32, on one device, on four ranks, and in a packed document over those."""
    tokens, rates = 1 << 16, torch.tensor([1e-6, 3e-6, 5e-6, 1e-5, 1.2345e-5])
    heads = len(rates)
    shape = {"constant": (heads,), "channel": (1, tokens, heads, 1)}.get(gate, (1, tokens, heads))
    g = -(rates if gate != "channel" else rates[:, None]).expand(shape)
    q, k = torch.zeros(2, 1, tokens, heads, 1)
    q[:, -1], k[:, 0] = 1, 1
    expected = (-rates.double() * (tokens - 1)).exp()

    def read(sp, documents=None):
        x = [t if sp is None or t.dim() == 1 else sp.shard(t) for t in (q, k, k, g)]
        operator = lasp.linear_attention
        if "delta" in gate:
            operator = lasp.delta_rule
            x.insert(3, x[1][..., 0])  # a beta of 1 where there is a key
        o, final = operator(*x, scale=1.0, output_final_state=True, sp=sp, cu_seqlens=documents)
        return o[0, -1, :, 0], final[0, :, 0, 0]

    def over_ranks(comm, documents=None):
        return read(sequence_parallel(comm, "all_gather", (tokens // 4,) * 4), documents)

    found = [read(None), run(4, over_ranks)[-1]]
    if gate == "scalar":  # whose sums over documents are made in another way
        found.append(run(4, partial(over_ranks, documents=(0, tokens)))[-1])
    for o, final in found:
        assert ((o - expected).abs() / expected).max() < 1e-5
        assert ((final - expected).abs() / expected).max() < 1e-5
    rounded = (-64 * rates).exp().double() ** (tokens / 64)
    assert ((rounded - expected).abs() / expected).max() > 1e-5, "the control: chunks' decays in fp32, multiplied"
