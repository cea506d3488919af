"""The autograd function that brings rows across ranks, and takes their gradients back.

A row travels once to every rank that wants it, from its holder straight to there: neighbour to neighbour, and over
several ranks only where shards are shorter than the width. In the backward pass its gradients come the same ways and
are added in rank order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lasp.exchange.start import SequenceCall, adjoint_of, save_after
from lasp.halo.rows import HaloPlan
from lasp.recurrence.derivatives import first_derivatives


def read_rows(x: Tensor, initial: Tensor | None, plan: HaloPlan, call: SequenceCall | None) -> tuple[Tensor, Tensor]:
    """The rows that a shard reads and does not hold.

    Args:
        x: [B, T, C].
        initial: [B, N * w, C], the rows before each document, the same on every rank; their gradient is whole on the
            first rank and zero elsewhere. None for none.

    Returns:
        the w rows before x [B, w, C], zero where its document has not begun there, and the rows that the plan needs
        [B, M, C].
    """
    before, needed = _ReadFromRanks.apply(plan, call, x, initial)
    return before, needed


class _ReadFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: HaloPlan, call: SequenceCall | None, x: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.call, ctx.like = plan, call, (x.shape, None if initial is None else initial.shape)
        before, needed = rows_read(x, initial, plan, call)
        save_after(ctx, needed)
        return before, needed

    @staticmethod
    @first_derivatives("short_convolution or token_shift", linear=True)
    def backward(ctx: Any, d_before: Tensor, d_needed: Tensor) -> tuple[Any, ...]:
        shape, initial_shape = ctx.like
        return None, None, *rows_gradients(d_before, d_needed, shape, initial_shape, ctx.plan, adjoint_of(ctx))


def rows_read(x: Tensor, initial: Tensor | None, plan: HaloPlan, call: SequenceCall | None) -> tuple[Tensor, Tensor]:
    """Give what `read_rows` does, which nothing differentiates."""
    route, batch, channels = plan.route, x.shape[0], x.shape[2]
    needed = x.new_zeros(batch, plan.num_rows, channels)
    pending = _batch_send_recv(
        call,
        [(x.index_select(1, tokens), rank) for rank, tokens in route.sends],
        [(x.new_empty(batch, len(positions), channels), rank) for rank, positions in route.receives],
    )
    needed.index_copy_(1, route.here[0], x.index_select(1, route.here[1]))
    if initial is not None:
        needed.index_copy_(1, route.state[0], initial.index_select(1, route.state[1]))
    for (_, positions), message in zip(route.receives, pending, strict=True):
        needed.index_copy_(1, positions, message.wait())
    _wait_for_sends(call)
    halo = needed[:, route.halo]
    missing = x.new_zeros(batch, plan.width - halo.shape[1], channels)
    return torch.cat((missing, halo), 1), needed


def rows_gradients(
    d_before: Tensor,
    d_needed: Tensor,
    shape: torch.Size,
    initial_shape: torch.Size | None,
    plan: HaloPlan,
    call: SequenceCall | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, of `shape`, and of `initial`, given those of what `rows_read` gave."""
    route = plan.route
    d_rows = d_needed.clone()
    count = route.halo.stop - route.halo.start
    d_rows[:, route.halo] += d_before[:, plan.width - count :]
    d_x = d_rows.new_zeros(shape)
    first = call is None or call.rank == 0
    # To the first rank go, after the gradients of its tokens, those of the initial states.
    going = dict(route.receives)
    if not first and len(route.state[0]):
        going[0] = torch.cat((going[0], route.state[0])) if 0 in going else route.state[0]
    coming: dict[int, list[Tensor]] = {}
    none = route.state[0].new_empty(0)
    for rank, tokens in route.sends:
        coming[rank] = [tokens, none]
    for rank, rows in route.state_of:
        coming.setdefault(rank, [none, none])[1] = rows
    pending = _batch_send_recv(
        call,
        [(d_rows.index_select(1, going[rank]), rank) for rank in sorted(going)],
        [
            (d_x.new_empty(shape[0], len(coming[rank][0]) + len(coming[rank][1]), shape[2]), rank)
            for rank in sorted(coming)
        ],
    )
    d_initial = None if initial_shape is None else d_x.new_zeros(initial_shape)
    d_x.index_add_(1, route.here[1], d_rows.index_select(1, route.here[0]))
    if d_initial is not None and first:
        d_initial.index_add_(1, route.state[1], d_rows.index_select(1, route.state[0]))
    for rank, message in zip(sorted(coming), pending, strict=True):
        tokens, rows = coming[rank]
        gradients = message.wait()
        d_x.index_add_(1, tokens, gradients[:, : len(tokens)])
        if d_initial is not None:
            d_initial.index_add_(1, rows, gradients[:, len(tokens) :])
    _wait_for_sends(call)
    return d_x, d_initial


def _batch_send_recv(
    call: SequenceCall | None, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]
) -> Any:
    """Start the messages; without other ranks there are none."""
    return [] if call is None else call.messages.batch_send_recv(sends, receives)


def _wait_for_sends(call: SequenceCall | None) -> None:
    if call is not None:
        call.messages.wait_for_sends()
