"""Messages that carry which call they belong to, for devices that the host must not wait for.

Over NCCL the hosts run ahead of their GPUs, and a captured graph exchanges without them. So there a call's number is
counted on the device, and each message begins with a header: four int64 words in front of its payload, viewed as the
payload's dtype. Who receives another header than its own makes the payload NaN and leaves both headers in memory that
the host looks at, without waiting, before its next call.

What no rank has described yet, and documents that no call had yet, the hosts compare beforehand: each once, whatever
the number of operators and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lasp.distributed.alarm import Trail
from lasp.distributed.call import Call, Calls
from lasp.distributed.comm import Comm, Pending
from lasp.distributed.record import Description, Record, RecordedStep, digest_of

WORDS = 4  # number, forward call's number, plan and documents, step
HEADER_BYTES = 8 * WORDS
_MOST_KNOWN = 4096
_STEP_BITS = 31


class Stamps(Protocol):
    """Operations on headers and sealed messages, as they run on the device."""

    def begin(self, state: Tensor, forward: Tensor | None, plan: int) -> Tensor:
        """Count a call: its header, int64 [WORDS]. state: int64 [2], calls so far and the step; forward: a header."""

    def seal(self, header: Tensor, payload: Tensor, length: int) -> Tensor:
        """A message [length] of the payload's dtype: the header, the payload, and whatever fills it up."""

    def open(self, header: Tensor, messages: Tensor, found: Tensor) -> None:
        """Compare the headers of `messages` [n, length]: where one is another, fill all behind it with NaN, and write
        the own and that one to `found`, int64 [2 * WORDS]."""


class TorchStamps:
    """Stamps by PyTorch, on any device."""

    def __init__(self) -> None:
        self._plans: dict[int, Tensor] = {}

    def begin(self, state: Tensor, forward: Tensor | None, plan: int) -> Tensor:
        words = self._plans.get(plan)
        if words is None:
            if len(self._plans) >= _MOST_KNOWN:
                self._plans.clear()
            words = self._plans[plan] = torch.tensor([0, plan], device=state.device)
        state[:1] += 1
        return torch.cat((state[:1], words[:1] if forward is None else forward[:1], words[1:], state[1:]))

    def seal(self, header: Tensor, payload: Tensor, length: int) -> Tensor:
        head, flat = header.view(payload.dtype), payload.reshape(-1)
        return torch.cat((head, flat, head[: length - len(head) - len(flat)]))

    def open(self, header: Tensor, messages: Tensor, found: Tensor) -> None:
        size = HEADER_BYTES // messages.element_size()
        headers = messages[:, :size].contiguous().view(torch.int64)
        others = (headers != header).any(1)
        if messages.dtype.is_floating_point:
            messages[:, size:].masked_fill_(others[:, None], torch.nan)
        both = torch.cat((header, headers[others.to(torch.uint8).argmax()]))
        found.copy_(torch.where(others.any(), both, found.to(header.device, non_blocking=True)), non_blocking=True)


class SealedCalls(Calls):
    """Begins the calls of a group whose messages are sealed.

    Args:
        comm: the ranks.
        device: whose tensors they exchange.
        stamps: what runs on the device.
    """

    def __init__(self, comm: Comm, device: torch.device, stamps: Stamps) -> None:
        super().__init__(comm)
        self.stamps, self.state = stamps, torch.zeros(2, dtype=torch.int64, device=device)
        self.found = torch.zeros(2 * WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen, self._step, self._place = self.found.numpy(), RecordedStep(), 0
        self._known: dict[int, str] = {}
        self._trail = Trail()
        comm.alarm.follow(self._trail, self._named)

    def begin(
        self,
        description: Description,
        documents: str | None = None,
        *,
        forward: Call | None = None,
        sources: Sequence[int] = (),
    ) -> SealedCall:
        """Begin a call; see `Calls.begin`.

        Raises:
            ExchangeError: a message came that belonged to another call, on this rank or another, or the ranks differ in
                what is new.
        """
        comm, record = self.comm, Record(0, description, documents)
        comm.alarm.check()
        if self._seen[0]:
            raise comm.alarm.raised(self._said(comm))
        if comm.step != self._step:
            self._step = comm.step
            self._place = (comm.step.number << _STEP_BITS) + comm.step.data % (1 << _STEP_BITS)
            self.state[1:].fill_(self._place)
        plan = self._agreed(comm, record)
        header, of = (forward.header, forward.number) if isinstance(forward, SealedCall) else (None, 0)
        self._trail.add(of, plan, self._place)
        record = record._replace(number=self._trail.number)
        return SealedCall(self, record, self.stamps.begin(self.state, header, plan))

    def _agreed(self, comm: Comm, record: Record) -> int:
        """A number for plan and documents, of which the hosts have compared each."""
        description, documents = record.description, record.documents
        plan = _word(description.digest)
        if plan not in self._known:
            self._learn(comm, plan, description, description.operator)
        if documents is None:
            return plan
        packed = plan ^ _word(digest_of(documents))
        if packed not in self._known:
            of_documents = _word(digest_of(documents))
            if of_documents not in self._known:
                self._learn(comm, of_documents, Description("documents", {"documents": documents}), documents)
            self._remember(packed, f"{description.operator} of {documents}")
        return packed

    def _learn(self, comm: Comm, word: int, description: Description, named: str) -> None:
        comm.compare(description)
        self._remember(word, named)

    def _remember(self, word: int, named: str) -> None:
        # Bounded: documents change every step. All ranks learn the same, so all forget at the same call.
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[word] = named

    def _said(self, comm: Comm) -> str:
        own, other = (f"call {number}, {self._named(words)}" for number, *words in self.found.view(2, WORDS).tolist())
        self.found.zero_()
        return (
            f"rank {comm.rank} received a message of another call; what it took from it is NaN:\n"
            f"  it was at {own}\n  the message was of {other}"
        )

    def _named(self, words: Sequence[int]) -> str:
        forward, plan, step = words
        of = f" of call {forward}" if forward else ""
        where = f", in step {step >> _STEP_BITS}" if step > 0 else ""
        return f"{self._known.get(plan, 'an unknown plan')}{of}{where}"


def _word(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)


class SealedCall(Call):
    """A call whose messages carry its header."""

    def __init__(self, calls: SealedCalls, record: Record, header: Tensor) -> None:
        super().__init__(calls, record, None)
        self._sealing, self.header = calls, header

    @property
    def seal(self) -> tuple[Tensor, Tensor]:
        return self.header, self._sealing.found

    def all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        sealed = self._sealed(tensor)
        self._uncount(sent=self.size - 1, received=self.size - 1, extra=sealed.nbytes - tensor.nbytes)
        return self.comm.all_gather(sealed).then(lambda rows: self._opened(rows, tensor.numel()))

    def send(self, tensor: Tensor, to: int) -> None:
        sealed = self._sealed(tensor)
        self._uncount(sent=1, extra=sealed.nbytes - tensor.nbytes)
        self.comm.send(sealed, to)

    def receive(self, like: Tensor, source: int) -> Pending[Tensor]:
        place = self._place(like)
        self._uncount(received=1, extra=place.nbytes - like.nbytes)
        return self.comm.receive(place, source).then(self._opening(like))

    def batch_send_recv(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> list[Pending[Tensor]]:
        sealed = [(self._sealed(tensor), to) for tensor, to in sends]
        places = [(self._place(like), source) for like, source in receives]
        for (whole, _), (tensor, _) in zip(sealed, sends, strict=True):
            self._uncount(sent=1, extra=whole.nbytes - tensor.nbytes)
        for (whole, _), (like, _) in zip(places, receives, strict=True):
            self._uncount(received=1, extra=whole.nbytes - like.nbytes)
        pending = self.comm.batch_send_recv(sealed, places)
        return [each.then(self._opening(like)) for each, (like, _) in zip(pending, receives, strict=True)]

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Pending[list[Tensor]]:
        rank, like = self.rank, parts[0]
        sealed = [part if r == rank else self._sealed(part) for r, part in enumerate(parts)]
        lengths = [n if r == rank else self._length(like, n) for r, n in enumerate(sizes)]
        for whole, part, length, n in zip(sealed, parts, lengths, sizes, strict=True):
            self._uncount(sent=1, extra=whole.nbytes - part.nbytes)
            self._uncount(received=1, extra=(length - n) * like.element_size())

        def opened(messages: list[Tensor]) -> list[Tensor]:
            return [
                message if r == rank else self._opened(message[None], n)[0]
                for r, (message, n) in enumerate(zip(messages, sizes, strict=True))
            ]

        return self.comm.all_to_all(sealed, lengths).then(opened)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        own = self.rank == source
        whole = self._sealed(tensor) if own else self._place(tensor)
        shares = {"sent": self.size - 1} if own else {"received": 1}
        self._uncount(**shares, extra=whole.nbytes - tensor.nbytes)
        came = self.comm.broadcast(whole, source)
        return tensor if own else self._opening(tensor)(came)

    def sum(self, tensor: Tensor) -> Tensor:
        shares = self.all_gather(tensor.contiguous().view(-1)).wait()
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        return total.view(tensor.shape)

    def _length(self, like: Tensor, count: int) -> int:
        """Numbers of a message of `count`: with the header, filled up so that the next begins at a whole word."""
        each = like.element_size()
        return (HEADER_BYTES + -(-count * each // 8) * 8) // each

    def _sealed(self, tensor: Tensor) -> Tensor:
        payload = tensor.detach().contiguous()
        return self._sealing.stamps.seal(self.header, payload, self._length(payload, payload.numel()))

    def _place(self, like: Tensor) -> Tensor:
        return like.new_empty(self._length(like, like.numel()))

    def _opened(self, messages: Tensor, count: int) -> Tensor:
        """The payloads [n, count] of messages [n, length]."""
        self._sealing.stamps.open(self.header, messages, self._sealing.found)
        head = HEADER_BYTES // messages.element_size()
        return messages[:, head : head + count]

    def _opening(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        shape, count = like.shape, like.numel()
        return lambda message: self._opened(message[None], count)[0].view(shape)

    def _uncount(self, *, extra: int, **shares: int) -> None:
        """Headers are no payload."""
        self.comm.counters.exempt(extra, **shares)
