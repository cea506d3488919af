"""ZeCO's all-scan (arXiv 2507.01004): the chain of the ring, the state cut into blocks that stream down it.

A rank passes on a block while it waits for the next. Volume as in the ring, one state a rank; the time
(size - 2 + P)(a + b / P) for P blocks, a the latency and b the time of a whole state, is least at
P = sqrt((size - 2) b / a). The paper cuts along K, which is right for elementwise decays only; here the cut is along
heads, or V, and right for all. The number of blocks is the model's best, by its measured or default constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.algebra import Summary
from lasp.distributed.call import Line, Messages
from lasp.distributed.comm import Pending as Message
from lasp.exchange.base import Exchange, ExchangeResult, Traffic, broadcast_traffic
from lasp.exchange.cost import Constants, Model, defaults
from lasp.exchange.payload import Cut, Payload, flat, flatten


class PendingPipelined:
    def __init__(self, line: Line, summary: Summary, initial: Tensor, cut: Cut, want_total: bool) -> None:
        self._line, self._summary, self._shape = line, flatten(summary), summary.state.shape
        self._initial, self._cut, self._want_total = initial, cut, want_total
        self._blocks = [block for block in range(len(cut.bounds) - 1) if cut.bounds[block] < cut.bounds[block + 1]]
        self._next = self._receive(0)

    def _receive(self, index: int) -> Message[Tensor] | None:
        line = self._line
        if line.position == 0 or index >= len(self._blocks):
            return None
        like = self._cut.of_state(self._summary.state, self._blocks[index])
        return line.comm.receive(like, line.rank(line.position - 1))

    def wait(self) -> ExchangeResult:
        line, cut, last = self._line, self._cut, self._line.size - 1
        initial = flat(self._initial)
        entering, leaving = [], []
        for index, block in enumerate(self._blocks):
            arriving, self._next = self._next, self._receive(index + 1)
            state = cut.of_state(initial, block) if arriving is None else arriving.wait()
            entering.append(state)
            if line.position == last and not self._want_total:
                continue
            after = cut.of_summary(self._summary, block).apply(state)
            if line.position == last:
                leaving.append(after)
            else:
                line.comm.send(after, line.rank(line.position + 1))
        whole = self._join(entering) if line.position > 0 else self._initial
        if not self._want_total:
            return ExchangeResult(whole, None)
        total = self._join(leaving) if line.position == last else whole
        return ExchangeResult(whole, line.comm.broadcast(total, line.rank(last)))

    def _join(self, blocks: list[Tensor]) -> Tensor:
        if not blocks:
            return self._initial
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 0 if self._cut.along_heads else -1)
        return whole.reshape(self._shape)


@dataclass(frozen=True)
class Pipelined(Exchange):
    """The chain, in blocks.

    Attributes:
        blocks: how many; None for the number that the cost model gives for `constants`.
        constants: of the group; None for the defaults of its backend.
    """

    blocks: int | None = None
    constants: Constants | None = None

    @classmethod
    def made_for(cls, constants: Constants) -> Pipelined:
        return cls(constants=constants)

    @property
    def name(self) -> str:
        if self.blocks is not None:
            return f"pipelined in {self.blocks} blocks"
        return "pipelined" if self.constants is None else f"pipelined by constants {self.constants.fingerprint}"

    def begin(
        self, comm: Messages, summary: Summary, initial: Tensor, *, reverse: bool, want_total: bool
    ) -> PendingPipelined:
        load, blocks = Payload.of(summary), self.blocks
        if blocks is None:
            blocks = Model(load, comm.nodes, self.constants or defaults(comm.backend)).best_blocks()
        return PendingPipelined(Line(comm, reverse), summary, initial, load.cut(blocks), want_total)

    def traffic(self, load: Payload, position: int, nodes: tuple[int, ...], *, want_total: bool) -> Traffic:
        size, state = sum(nodes), load.state_bytes
        chain = Traffic(state * (position < size - 1), state * (position > 0))
        return chain + broadcast_traffic(load, position, size) if want_total else chain

    def seconds(self, model: Model, *, want_total: bool) -> float:
        seconds = model.pipeline(self.blocks or model.best_blocks())
        return (
            seconds + model.apply_summary(alone=True) + model.broadcast(model.load.state_bytes)
            if want_total
            else seconds
        )
