"""Our operators against flash-linear-attention's naive functions: fp32, outputs, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from tolerances import BOUNDS, worst
from torch.nn.functional import normalize

import lasp

B, T, H, K, V = 2, 150, 2, 16, 12


def _naive_delta_rule(q, k, v, beta, initial_state):
    o, state = delta_rule_recurrence(*(t.transpose(1, 2) for t in (q, k, v, beta)), initial_state=initial_state)
    return o.transpose(1, 2), state


def _ours(op):
    return lambda *tensors, initial_state: op(*tensors, initial_state=initial_state, output_final_state=True)


def _theirs(op, *names):
    return lambda *tensors, initial_state: op(
        **dict(zip(names, tensors, strict=True)), initial_state=initial_state, output_final_state=True
    )


# Inputs, our operator, theirs; value heads.
CASES = {
    "simple_gla": ("q k v g", lasp.linear_attention, _theirs(naive_recurrent_simple_gla, *"qkvg"), H),
    "gla": ("q k v gk", lasp.linear_attention, _theirs(naive_recurrent_gla, "q", "k", "v", "gk"), H),
    "delta_rule": ("q k v beta", lasp.delta_rule, _naive_delta_rule, H),
    "gated_delta_rule": (
        "q k v beta g",
        lasp.delta_rule,
        _theirs(naive_recurrent_gated_delta_rule, "q", "k", "v", "beta", "g"),
        H,
    ),
    "kda": ("q k v beta gk", lasp.delta_rule, _theirs(naive_recurrent_kda, "q", "k", "v", "beta", "g"), 2 * H),
}


def _inputs(names: str, value_heads: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = (B, T, value_heads)
    every = {
        "q": torch.randn(B, T, H, K),
        "k": normalize(torch.randn(B, T, H, K), dim=-1),
        "v": torch.randn(*shape, V),
        "beta": 2 * torch.rand(shape),
        "g": -0.05 * torch.rand(shape),
        "gk": -0.05 * torch.rand(*shape, K),
        "initial_state": torch.randn(B, value_heads, K, V),
    }
    return {name: every[name] for name in (*names.split(), "initial_state")}


def _solve(op, inputs):
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    state = leaves.pop("initial_state")
    o, final = op(*leaves.values(), initial_state=state)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=random) for t in (o, final)]
    torch.autograd.backward((o, final), weights)
    gradients = {f"d_{name}": t.grad for name, t in (*leaves.items(), ("initial_state", state))}
    return {"o": o, "final_state": final, **gradients}


@pytest.mark.parametrize("name", CASES)
def test_agrees(name):
    names, ours, theirs, value_heads = CASES[name]
    inputs = _inputs(names, value_heads)
    expected = _solve(theirs, inputs)
    tensor, error = worst(_solve(_ours(ours), inputs), expected)
    assert error < BOUNDS[torch.float32], tensor
    # The control: the carried state dropped, and gates or keys shifted by a token.
    for changed in ("initial_state", names.split()[-1]):
        wrong = {**inputs, changed: torch.zeros_like(inputs[changed]) if changed == "initial_state" else
                 inputs[changed].roll(1, 1)}  # fmt: skip
        assert worst(_solve(_ours(ours), wrong), expected)[1] > 1e-3
