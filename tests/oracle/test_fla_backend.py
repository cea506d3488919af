"""The backend "fla" with flash-linear-attention's own kernels, interpreted, against the chunked PyTorch backend."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tolerances import relative_error, worst
from torch.nn.functional import normalize
from world import run

import lasp
from lasp.kernels.fla import delta

H, HV, K, V = 1, 2, 16, 16


@pytest.fixture(autouse=True)
def _any_device(monkeypatch):
    """The interpreter needs no GPU, and computes in fp32 what the GPU does in bf16."""
    monkeypatch.setattr(delta, "refuse", lambda v, keys, gate_dims: None)


def solve(backend, gate, tokens, cu_seqlens=None, states=1, sp=None):
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    gates = {"none": None, "scalar": normal(1, tokens, HV), "channel": normal(1, tokens, HV, K)}
    leaves = {
        "q": normal(1, tokens, H, K),
        "k": normalize(normal(1, tokens, H, K), dim=-1),
        "v": normal(1, tokens, HV, V),
        "beta": 2 * torch.rand(1, tokens, HV, generator=random),
        "initial_state": normal(states, HV, K, V),
        "g": None if gates[gate] is None else -0.1 * gates[gate].abs(),
    }
    d_o, d_final = normal(1, tokens, HV, V), normal(*leaves["initial_state"].shape)
    if sp is not None:
        leaves = {n: t if t is None or n == "initial_state" else sp.shard(t).clone() for n, t in leaves.items()}
        d_o, d_final = sp.shard(d_o), d_final / sp.size
    leaves = {name: t if t is None else t.requires_grad_() for name, t in leaves.items()}
    o, final = lasp.delta_rule(
        *(leaves[name] for name in ("q", "k", "v", "beta", "g")), initial_state=leaves["initial_state"],
        output_final_state=True, backend=backend, cu_seqlens=cu_seqlens, normalize_qk=True, sp=sp,
    )  # fmt: skip
    torch.autograd.backward((o, final), (d_o, d_final))
    return {
        "o": o.detach(),
        "final_state": final.detach(),
        **{f"d_{n}": t.grad for n, t in leaves.items() if t is not None},
    }


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_equals_torch(gate):
    """Grouped heads, a ragged last chunk, a state in and out: outputs and every gradient."""
    got, expected = solve("fla", gate, 70), solve("torch", gate, 70)
    tensor, error = worst(got, expected)
    assert error < 2e-6, tensor
    moved = {name: t.roll(1, 1) for name, t in expected.items()}
    assert worst(got, moved)[1] > 1e-2, "the control"


@pytest.mark.parametrize("gate", ["scalar", "channel"])
def test_packed_documents(gate):
    bounds = [0, 30, 30, 67, 70]
    tensor, error = worst(solve("fla", gate, 70, bounds, 4), solve("torch", gate, 70, bounds, 4))
    assert error < 2e-6, tensor


def test_crosses_ranks():
    """Two processes, ragged: outputs, state and every gradient as on one."""
    expected = solve("torch", "scalar", 70)

    def work(rank: int) -> float:
        errors = []
        for exchange in ("ring", "all_gather"):
            sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(33, 37), exchange=exchange)
            for name, value in solve("fla", "scalar", 70, sp=sp).items():
                reference = expected[name]
                if name == "d_initial_state":
                    reference = reference * (rank == 0)
                elif name != "final_state":
                    reference = sp.shard(reference)
                errors.append(relative_error(value, reference))
        return max(errors)

    assert max(run(2, work)) < 2e-6


def test_no_tokens():
    tensor, error = worst(solve("fla", "scalar", 0), solve("torch", "scalar", 0))
    assert error == 0, tensor
