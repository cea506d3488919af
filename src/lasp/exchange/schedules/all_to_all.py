"""The all-to-all scan: every rank scans its slice of the state for all ranks.

Two all-to-alls, of about one summary and one state a rank whatever the number of ranks: slices of the summaries to
the rank that scans them, and the entering slices back. Slices are along heads, each with its transition; where there
are fewer heads than ranks, along V, and then every slice travels with the whole transition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Collective
from lasp.exchange.base import Exchange, ExchangeResult, Traffic
from lasp.exchange.cost import Model
from lasp.exchange.payload import Payload, flat, flatten


class PendingAllToAll:
    """Slices are numbered by the position of the rank that scans them."""

    def __init__(self, line: Line, summary: Summary, initial: Tensor, want_total: bool) -> None:
        self._line, self._initial, self._want_total = line, initial, want_total
        self._summary, self._cut = flatten(summary), Payload.of(summary).cut(line.size)
        self._own = self._cut.of_summary(self._summary, line.position)
        last = line.size - 1
        # Nobody needs the last rank's summary but for the total.
        silent = line.position == last and not want_total
        sends = [
            _pack(self._cut.of_summary(self._summary, slice_), not silent or slice_ == last)
            for slice_ in range(line.size)
        ]
        sizes = [sends[line.position].numel()] * line.size
        if not want_total:
            sizes[last] = 0
        self._slices = self._all_to_all(sends, sizes)

    def _all_to_all(self, sends: list[Tensor], sizes: list[int]) -> Collective[list[Tensor]]:
        """The communicator's all-to-all, by position."""
        step = -1 if self._line.reverse else 1
        return self._line.comm.all_to_all(sends[::step], sizes[::step])

    def _received(self, collective: Collective[list[Tensor]]) -> list[Tensor]:
        return collective.wait()[:: -1 if self._line.reverse else 1]

    def wait(self) -> ExchangeResult:
        line, cut, initial = self._line, self._cut, flat(self._initial)
        slices = self._received(self._slices)
        state = cut.of_state(initial, line.position)
        # For every position: the slice that enters it, which the first knows, and the total where it is wanted.
        answers: list[list[Tensor]] = [[] for _ in range(line.size)]
        for position in range(line.size):
            if position > 0:
                answers[position].append(state)
            if state.numel() and (position < line.size - 1 or self._want_total):
                state = self._own.unpack_like(slices[position]).apply(state)
        if self._want_total:
            for answer in answers:
                answer.append(state)
        sends = [torch.stack(answer) if answer else state.new_empty(0) for answer in answers]
        count = len(answers[line.position])
        shapes = [cut.of_state(initial, slice_).shape for slice_ in range(line.size)]
        received = self._received(self._all_to_all(sends, [count * shape.numel() for shape in shapes]))
        if count == 0:
            return ExchangeResult(self._initial, None)
        parts = [part.view(count, *shape) for part, shape in zip(received, shapes, strict=True)]
        states = torch.cat(parts, 1 if cut.along_heads else -1).view(count, *self._initial.shape)
        return ExchangeResult(
            states[0] if line.position > 0 else self._initial, states[-1] if self._want_total else None
        )


def _pack(summary: Summary, wanted: bool) -> Tensor:
    return summary.pack() if wanted and summary.state.numel() else summary.state.new_empty(0)


class AllToAll(Exchange):
    """Two all-to-alls around a local scan of one slice."""

    name = "all_to_all"

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingAllToAll:
        return PendingAllToAll(Line(comm, reverse), summary, initial, want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        size = sum(nodes)
        last, own = size - 1, load.part(load.cut(size), position)
        # The slices together are the load, but for transitions, which every slice along V has.
        slices = 1 if load.cut(size).along_heads else min(load.values, size)
        summaries = load.state_bytes + slices * (load.summary_bytes - load.state_bytes)
        silent = position == last and not want_total
        speakers = last if want_total else last - (position < last)
        there = Traffic(0 if silent else summaries - own.summary_bytes, own.summary_bytes * speakers)
        answers = last * want_total + last - (position > 0)
        back = Traffic(own.state_bytes * answers, (load.state_bytes - own.state_bytes) * ((position > 0) + want_total))
        return there + back

    def seconds(self, model: Model, *, want_total: bool) -> float:
        load, size = model.load, model.size
        # The largest slice decides; no slice is larger than the last.
        largest = load.part(load.cut(size), size - 1)
        there = (size - 1) * largest.summary_bytes
        back = load.state_bytes * (1 + want_total) * (size - 1) / size
        # Slices are copied out and in again on both ways.
        copies = 4 * model.apply_summary()
        return (
            model.all_to_all(there)
            + (size - 1 + want_total) * model.apply_summary(largest)
            + model.all_to_all(back)
            + copies
        )
