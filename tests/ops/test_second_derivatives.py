"""Second derivatives are right or refused: none that lacks terms is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exchange.simulated import run, sequence_parallel
from tolerances import relative_error
from torch import Tensor
from torch.autograd.function import once_differentiable

import lasp
from lasp.models.loss import cross_entropy_sum

Function = Callable[[Tensor, Tensor], Tensor]


def _attention(**options: Any) -> Function:
    """x [1, 6, 2, 3] as queries, keys and values; w [3, 3] as the state before."""
    return lambda x, w: lasp.linear_attention(
        x, x.flip(2), x.cos(), initial_state=w.expand(1, 2, 3, 3), **options
    )[0]  # fmt: skip


def _softmax(**options: Any) -> Function:
    return lambda x, w: lasp.softmax_attention(x, x.flip(2) @ w, x.cos(), **options)[0]


OPERATORS: dict[str, Function] = {
    "linear_attention": _attention(),
    "linear_attention, reference": _attention(backend="reference"),
    "linear_attention, unmasked": _attention(causal=False),
    "linear_attention, fused": lambda x, w: _attention(backend="triton")(x.float(), w.float()),
    "normalized_linear_attention": lambda x, w: lasp.normalized_linear_attention(x.exp(), x.exp() @ w.exp(), x)[0],
    "delta_rule": lambda x, w: lasp.delta_rule(x, x @ w, x, x[..., 0].sigmoid(), normalize_qk=True)[0],
    "short_convolution": lambda x, w: lasp.short_convolution(x[:, :, 0], w, activation="silu")[0],
    "token_shift": lambda x, w: lasp.token_shift(x[:, :, 0] @ w)[0].square(),
    "softmax_attention": _softmax(),
    "softmax_attention, reference": _softmax(backend="reference"),
    "cross_entropy_sum": lambda x, w: cross_entropy_sum(x.flatten(0, 2), w, torch.arange(12) % 3),
}
REFUSED = "first derivatives only|is not implemented"
# On one device a convolution is PyTorch's own functions.
RIGHT = {"softmax_attention, reference", "short_convolution", "token_shift"}


def _leaves() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 6, 2, 3), (3, 3))
    )


def _twice(function: Function, *, squared: bool) -> float:
    """Error of d/dw of a sum of first derivatives, against finite differences of these. What is summed is the output,
    whose gradient is then a constant, or its square; and x and w are used beside the operator, so that autograd has
    another way from the one to the other."""

    def first(x: Tensor, w: Tensor) -> Tensor:
        o = function(x, w)
        loss = (o.square() if squared else o).sum() + (x.sin()[..., :1] * w.sin()[0]).sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0].sum()

    x, w = _leaves()
    (second,) = torch.autograd.grad(first(x, w), w)
    steps = 1e-5 * torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    expected = torch.stack([(first(x, w + step) - first(x, w - step)).detach() / 2e-5 for step in steps]).view(3, 3)
    return relative_error(second, expected)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_right_or_refused(name: str, squared: bool) -> None:
    if name in RIGHT:
        assert _twice(OPERATORS[name], squared=squared) < 1e-8
        return
    with pytest.raises(RuntimeError, match=REFUSED):
        _twice(OPERATORS[name], squared=squared)


class _Once(torch.autograd.Function):
    """x @ w, refused as PyTorch does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d @ w.mT, (x.mT @ d).sum((0, 1))


@pytest.mark.parametrize("squared", [False, True])
def test_a_lost_term_is_seen(squared: bool) -> None:
    """The control: PyTorch's own refusal gives wrong numbers here, without a word."""
    assert _twice(_Once.apply, squared=squared) > 0.1


def test_over_ranks() -> None:
    """Rows and tokens that cross ranks: constants' gradients pass, others are refused."""
    x, w = (leaf.detach() for leaf in _leaves())
    functions: list[Callable[[Tensor, Tensor, Any], Tensor]] = [
        lambda x, w, sp: lasp.short_convolution(x[:, :, 0], w, sp=sp)[0],
        lambda x, w, sp: lasp.softmax_attention(x, x @ w, x, sp=sp, backend="reference")[0],
        lambda x, w, sp: lasp.softmax_attention(x, x @ w, x, sp=sp, backend="reference", method="ulysses")[0],
    ]

    def work(comm: Any) -> Tensor:
        sp = sequence_parallel(comm, "ring", (2, 4))
        for function in functions:
            leaves = sp.shard(x).clone().requires_grad_(), w.clone().requires_grad_()
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(function(*leaves, sp).sum(), leaves, create_graph=True)
        shard = sp.shard(x).clone().requires_grad_()
        y, _ = lasp.token_shift(shard[:, :, 0], sp=sp)
        return torch.autograd.grad(y.sum(), shard, create_graph=True)[0]

    d_x = torch.cat(run(2, work), 1)
    assert d_x[:, :-1, 0].eq(1).all() and not d_x[:, -1].any()
