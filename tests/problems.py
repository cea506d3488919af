"""Problems for the operators, and their solution by the reference in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import lasp

GATES = ("none", "constant", "scalar", "channel")


@dataclass(frozen=True)
class Problem:
    """Global inputs, and the gradients that come back to the outputs."""

    inputs: dict[str, Tensor | None]
    d_o: Tensor
    d_final: Tensor
    causal: bool = True
    cu_seqlens: tuple[int, ...] | None = None


def make(
    gate: str,
    *,
    batch: int = 2,
    tokens: int = 37,
    heads: int = 2,
    value_heads: int = 2,
    keys: int = 5,
    values: int = 3,
    slow: float = 0.02,
    causal: bool = True,
    cu_seqlens: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Problem:
    """Random inputs in fp64. Decays are slow, so that what comes from far still counts."""
    states = (batch if cu_seqlens is None else len(cu_seqlens) - 1, value_heads, keys, values)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    shapes = {
        "none": None,
        "constant": (value_heads,),
        "scalar": (batch, tokens, value_heads),
        "channel": (batch, tokens, value_heads, keys),
    }
    shape = shapes[gate]
    return Problem(
        {
            "q": normal(batch, tokens, heads, keys),
            "k": normal(batch, tokens, heads, keys),
            "v": normal(batch, tokens, value_heads, values),
            "g": None if shape is None else -slow * torch.rand(shape, generator=random, dtype=torch.float64),
            "initial_state": normal(*states),
        },
        normal(batch, tokens, value_heads, values),
        normal(*states),
        causal,
        cu_seqlens,
    )


def solve(
    problem: Problem, backend: str, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Outputs, final state and all gradients, computed on one device, on the CPU."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: None if t is None else t.to(device, dtype if name in "qkv" else wide, copy=True).requires_grad_()
        for name, t in problem.inputs.items()
    }
    o, final = lasp.linear_attention(
        leaves["q"], leaves["k"], leaves["v"], leaves["g"], initial_state=leaves["initial_state"],
        output_final_state=True, causal=problem.causal, cu_seqlens=problem.cu_seqlens, backend=backend,
    )  # fmt: skip
    torch.autograd.backward((o, final), (problem.d_o.to(o), problem.d_final.to(final)))
    results = {"o": o.detach(), "final_state": final.detach()}
    results |= {f"d_{name}": t.grad for name, t in leaves.items() if t is not None}
    return {name: result.cpu() for name, result in results.items()}
