"""The public operator on the Triton backend: gradients, recomputation, and two ranks, all in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from problems import GATES, make, solve
from tolerances import relative_error
from torch.utils.checkpoint import checkpoint
from world import run

import lasp

BOUND = 4e-6  # inputs are rounded to fp32 first, and gradients of a constant decay cancel
DIMS = {"batch": 1, "tokens": 70, "heads": 1, "value_heads": 2, "keys": 16, "values": 16}


@pytest.mark.parametrize("gate", GATES)
def test_operator(gate: str) -> None:
    problem = make(gate, **DIMS)
    values, references = solve(problem, "triton", torch.float32), solve(problem, "torch")
    for name, value in values.items():
        assert relative_error(value, references[name]) <= BOUND, name


def test_packed_documents_are_refused() -> None:
    """Rather than computed as one."""
    x = {name: tensor.float() for name, tensor in make("none", **DIMS).inputs.items() if name in "qkv"}
    with pytest.raises(ValueError, match="packed documents"):
        lasp.linear_attention(**x, cu_seqlens=[0, 30, 70], backend="triton")


def test_recomputation_gives_the_same_gradients() -> None:
    problem = make("scalar", **DIMS)
    leaves = [problem.inputs[name].float().requires_grad_() for name in "qkvg"]

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return lasp.linear_attention(*inputs, backend="triton")[0]

    d_o = problem.d_o.float()
    plain = torch.autograd.grad(call(*leaves), leaves, d_o)
    recomputed = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False), leaves, d_o)
    for first, second in zip(plain, recomputed, strict=True):
        assert torch.equal(first, second)


def test_two_ranks_equal_one() -> None:
    """Outputs, the final state and every gradient, with shards of unequal length."""
    problems = {gate: make(gate, **DIMS) for gate in GATES}
    expected = {gate: solve(problem, "torch") for gate, problem in problems.items()}

    def work(rank: int) -> dict[str, float]:
        sp = lasp.SequenceParallel(dist.group.WORLD, lengths=(41, 29))
        errors = {}
        for gate, problem in problems.items():
            leaves = {}
            for name, tensor in problem.inputs.items():
                if tensor is not None:
                    whole = name == "initial_state" or tensor.dim() == 1
                    leaves[name] = (tensor if whole else sp.shard(tensor)).float().clone().requires_grad_()
            o, final = lasp.linear_attention(
                leaves["q"], leaves["k"], leaves["v"], leaves.get("g"), initial_state=leaves["initial_state"],
                output_final_state=True, sp=sp, backend="triton",
            )  # fmt: skip
            torch.autograd.backward((o, final), (sp.shard(problem.d_o).float(), problem.d_final.float() / sp.size))
            results = {"o": o, "final_state": final, **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}
            for name, value in results.items():
                reference = expected[gate][name]
                if name == "d_initial_state" and rank > 0:
                    reference = torch.zeros_like(reference)
                elif name == "d_g" and value.dim() == 1:
                    dist.all_reduce(value)
                elif name not in ("final_state", "d_initial_state"):
                    reference = sp.shard(reference)
                errors[f"{gate} {name}"] = relative_error(value, reference)
        return errors

    for rank, errors in enumerate(run(2, work)):
        bad = {name: error for name, error in errors.items() if error > BOUND}
        assert not bad, (rank, bad)
