"""The laws every transition obeys, and the delta rule under the same scan and the same exchanges."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error
from world import run

import lasp
from lasp.algebra import Dense, Diagonal, Identity, Scalar, Summary, compose, scan
from lasp.exchange import EXCHANGES
from lasp.kernels.reference import STAGES
from lasp.ops.autograd import scan as scan_across_ranks
from lasp.ops.scan import ScanPlan
from lasp.recurrence.inputs import DeltaInputs

K, V = 4, 3
KINDS = ("identity", "scalar", "diagonal", "dense")


def summaries(kind: str, count: int, seed: int) -> Summary:
    """`count` random summaries stacked along the leading axis."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(count, 2, *shape, generator=random, dtype=torch.float64)

    transition = {
        "identity": lambda: Identity(),
        "scalar": lambda: Scalar(-normal().abs()),
        "diagonal": lambda: Diagonal(-normal(K).abs()),
        "dense": lambda: Dense(0.5 * normal(K, K)),
    }[kind]()
    return Summary(transition, normal(K, V))


def same(one: Summary, other: Summary) -> bool:
    pairs = zip((*one.transition.tensors(), one.state), (*other.transition.tensors(), other.state), strict=True)
    return all(relative_error(a, b) < 1e-13 for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_laws(kind, seed):
    runs = summaries(kind, 3, seed)
    a, b, c = runs[0], runs[1], runs[2]
    state = torch.randn(2, K, V, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    assert same(compose(c, compose(b, a)), compose(compose(c, b), a)), "associative"
    assert relative_error(compose(b, a).apply(state), b.apply(a.apply(state))) < 1e-13, "apply after compose"
    neutral = Summary(type(a.transition).identity(a.state), torch.zeros_like(a.state))
    assert same(compose(neutral, a), a) and same(compose(a, neutral), a), "identity"
    assert same(a.unpack_like(c.pack()), c), "pack and unpack"
    assert a.pack().nbytes == a.nbytes, "nbytes"
    left, right = a.transition.apply(state) * c.state, state * a.transition.adjoint().apply(c.state)
    assert (left.sum() - right.sum()).abs() < 1e-13 * left.abs().sum(), "adjoint"  # the sums may cancel
    entering, end = scan(runs, state)
    assert relative_error(end, compose(c, compose(b, a)).apply(state)) < 1e-13, "scan is the fold"
    assert relative_error(entering[2], compose(b, a).apply(state)) < 1e-13
    backwards, _ = scan(runs, state, reverse=True)
    assert relative_error(backwards[1], c.apply(state)) < 1e-13
    if kind != "identity":
        assert not same(compose(a, b), compose(b, a)), "the control: order matters"


@pytest.mark.parametrize("kind", KINDS)
def test_sliceable_dims_are_true(kind):
    """A slice of the state evolves on its own along the declared dims, and along K not under a dense transition."""
    transition = summaries(kind, 1, 0)[0].transition
    state = torch.randn(2, K, V, dtype=torch.float64)
    assert "V" in transition.sliceable
    assert torch.allclose(transition.apply(state)[..., :1], transition.apply(state[..., :1]), atol=0, rtol=1e-14)
    assert ("K" in transition.sliceable) == (kind != "dense")


def delta_inputs(gate: str, tokens: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs = {
        "q": normal(1, tokens, 2, K),
        "k": torch.nn.functional.normalize(normal(1, tokens, 2, K), dim=-1),
        "v": normal(1, tokens, 2, V),
        "beta": 2 * normal(1, tokens, 2).sigmoid(),
    }
    shape = {"none": None, "scalar": (1, tokens, 2), "channel": (1, tokens, 2, K)}[gate]
    if shape is not None:
        inputs["g"] = -0.05 * normal(*shape).abs()
    return inputs


def delta_solution(inputs, sp=None):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    x = DeltaInputs(leaves["q"], leaves["k"], leaves["v"], leaves["beta"], leaves.get("g"), 0.5)
    o, _ = scan_across_ranks(ScanPlan("delta_rule", STAGES["delta"], sp, False), x, None)
    o.square().sum().backward()
    return [o.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_delta_rule_is_the_textbook_loop(gate):
    """The delta rule's summaries against its definition: read the old value, write the difference."""
    inputs = delta_inputs(gate, 6)
    q, k, v, beta = (inputs[name] for name in ("q", "k", "v", "beta"))
    state = torch.zeros(1, 2, K, V, dtype=torch.float64)
    outputs = []
    for t in range(6):
        if gate != "none":
            decay = inputs["g"][:, t].exp()
            state = state * (decay[..., None, None] if gate == "scalar" else decay[..., None])
        old = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = beta[:, t, :, None] * (v[:, t] - old)
        state = state + k[:, t, ..., None] * write[..., None, :]
        outputs.append(0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    assert relative_error(delta_solution(inputs)[0], torch.stack(outputs, 1)) < 1e-13


def test_delta_rule_crosses_ranks():
    """Matrix transitions through the unchanged scan and exchanges: outputs and all gradients at 1e-12."""
    problems = [delta_inputs(gate, 11) for gate in ("none", "scalar", "channel")]
    expected = [delta_solution(inputs) for inputs in problems]

    def work(rank: int) -> float:
        worst = 0.0
        for exchange in EXCHANGES:
            sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(4, 0, 7), exchange=exchange)
            for inputs, reference in zip(problems, expected, strict=True):
                got = delta_solution({name: sp.shard(tensor) for name, tensor in inputs.items()}, sp)
                worst = max(worst, *(relative_error(a, sp.shard(b)) for a, b in zip(got, reference, strict=True)))
        return worst

    assert max(run(3, work)) < 1e-12
