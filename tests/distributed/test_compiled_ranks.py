"""torch.compile of a function that calls an operator over ranks: the graph breaks around it, or holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from world import run

import lasp
from lasp.ops.autograd import TRACEABLE

DOCUMENTS = (0, 3, 3, 11, 16)
BETA, TAPS = torch.full((1, 8, 2), 0.5), torch.ones(2, 3)
OPERATORS: dict[str, Callable[..., Any]] = {
    "output_final_state": lambda x, sp: lasp.linear_attention(x, x, x, sp=sp, output_final_state=True)[0],
    "delta rule": lambda x, sp: lasp.delta_rule(x, x, x, BETA, sp=sp, normalize_qk=True)[0],
    "softmax_attention": lambda x, sp: lasp.softmax_attention(x, x, x, sp=sp, window=3)[0],
    "short_convolution": lambda x, sp: lasp.short_convolution(x[..., 0], TAPS, sp=sp)[0],
    "token_shift": lambda x, sp: lasp.token_shift(x[..., 0], sp=sp)[0],
}
BROKEN = ("delta rule", "short_convolution")  # within the operator, and around it


def plain(x: Tensor, sp: lasp.SequenceParallel) -> Tensor:
    return lasp.linear_attention(x, x, x, sp=sp)[0]


WHOLE: dict[str, Callable[..., Tensor]] = {
    "keys of all": lambda x, sp: lasp.softmax_attention(x, x, x, sp=sp, method="all_gather")[0],
    "keys of all, packed": lambda x, sp: lasp.softmax_attention(
        x, x, x, cu_seqlens=DOCUMENTS, sp=sp, method="all_gather"
    )[0],
    "tokens for heads, packed": lambda x, sp: lasp.softmax_attention(x, x, x, cu_seqlens=DOCUMENTS, sp=sp)[0],
}


def compiled(function: Callable[..., Tensor], x: Tensor, sp: lasp.SequenceParallel, *, fullgraph: bool) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)(x, sp)


def test_a_whole_graph_is_refused_by_name_and_a_broken_one_is_right() -> None:
    def work(rank: int) -> list[str]:
        sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=60)
        x = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(rank))
        found = []
        for name, function in OPERATORS.items():
            try:
                compiled(function, x, sp, fullgraph=True)
                found.append(f"{name}: compiled")
            except Exception as error:
                if name not in str(error) or "leave fullgraph=True out" not in str(error):
                    found.append(f"{name}: {error}")
            if name in BROKEN and not torch.equal(compiled(function, x, sp, fullgraph=False), function(x, sp)):
                found.append(f"{name}: other outputs")
        if not torch.equal(compiled(plain, x, sp, fullgraph=TRACEABLE), plain(x, sp)):  # the control
            found.append("linear attention: other outputs")
        x.requires_grad_()
        for name, function in WHOLE.items():
            results = (compiled(function, x, sp, fullgraph=True), function(x, sp))
            own, expected = ((y, torch.autograd.grad(y.sin().sum(), x)[0]) for y in results)
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, expected, strict=True)):
                found.append(f"{name}: other outputs")
        return found

    assert run(2, work) == [[], []]
