"""Records that the ranks of a group tell each other, over their hosts, before they exchange anything.

A record says what a rank is about to do: which call of its group, of which operator and in which direction, on which
plan and documents, in which step, on shards of which tensors. All ranks see all records, so where two differ all of
them find the same difference. Records have one size whatever they say, because gloo takes others for data.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

RECORD_BYTES = 2048
SOURCES = 6
# Digests of the plan and of the documents; number, forward call, step, position in the data, number given; is an error;
# sources.
_HEAD = struct.Struct(f"<16s16s5q?{SOURCES}Q")
_ERROR = _HEAD.size - 8 * SOURCES - 1
_ROOM = RECORD_BYTES - _HEAD.size
_NO_DOCUMENTS = bytes(16)


class ExchangeError(RuntimeError):
    """Communication between the ranks of a group failed, or the ranks disagree about what to do."""


class Description:
    """A plan as ranks compare it, written out once for all calls that follow it.

    Args:
        operator: what is computed.
        fields: everything else that must be the same on all ranks.
    """

    def __init__(self, operator: str, fields: Mapping[str, object]) -> None:
        self.operator, self.fields = operator, fields
        self.text = json.dumps({"operator": operator, **fields}, default=str)
        self.digest = digest_of(self.text)
        self._of_pass: dict[str, Description] = {}

    def of(self, part: str) -> Description:
        """The description of another pass of the same operator."""
        described = self._of_pass.get(part)
        if described is None:
            described = self._of_pass[part] = Description(f"{part} of {self.operator}", self.fields)
        return described


@lru_cache(maxsize=64)
def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class RecordedStep(NamedTuple):
    """A program's position: the number of its step, and a number that stands for the step's data; -1 for unknown."""

    number: int = -1
    data: int = -1


class Record(NamedTuple):
    """The call that one rank is about to make.

    Attributes:
        number: of its calls within the group.
        description: of the operator, its pass and its plan.
        documents: what stands for the packed documents, or None.
        forward: the number of the call whose gradients these are, 0 where it is no such call or not known.
        step: where the program is.
        sources: what stands for the tensors that the shards come from; 0 for not known.
        given: a number for the other ranks; it may differ.
        error: this rank has failed, as `description` says, and takes no part.
    """

    number: int
    description: Description
    documents: str | None = None
    forward: int = 0
    step: RecordedStep = RecordedStep()
    sources: Sequence[int] = ()
    given: int = 0
    error: bool = False

    def written(self) -> Tensor:
        """uint8 [RECORD_BYTES]."""
        text, documents = self.description.text, self.documents
        digest = _NO_DOCUMENTS if documents is None else digest_of(documents)
        sources = (*self.sources, *(0,) * (SOURCES - len(self.sources)))
        head = _HEAD.pack(
            self.description.digest, digest, self.number, self.forward, *self.step, self.given, self.error, *sources
        )
        shown = text if documents is None else json.dumps({"documents": documents})[:-1] + ", " + text[1:]
        record = (head + shown.encode()[:_ROOM]).ljust(RECORD_BYTES, b"\0")
        return torch.frombuffer(bytearray(record), dtype=torch.uint8)


class _Read(NamedTuple):
    """A record as another rank sees it."""

    plan: bytes
    documents: bytes
    number: int
    forward: int
    step: RecordedStep
    given: int
    error: bool
    sources: tuple[int, ...]
    text: str

    @staticmethod
    def of(record: bytes) -> _Read:
        plan, documents, number, forward, step, data, given, error, *sources = _HEAD.unpack_from(record)
        text = record[_HEAD.size :].rstrip(b"\0").decode(errors="replace")
        return _Read(plan, documents, number, forward, RecordedStep(step, data), given, error, tuple(sources), text)

    def named(self) -> str:
        """The call, for people."""
        of = f" of call {self.forward}" if self.forward else ""
        where = "" if self.step == RecordedStep() else f", in step {self.step.number}"
        return f"call {self.number}, {self.shown().get('operator', 'unreadable')}{of}{where}"

    def shown(self) -> dict[str, object]:
        try:
            fields: dict[str, object] = json.loads(self.text)
        except json.JSONDecodeError:  # cut off
            return {"operator": self.text.partition('"operator": "')[2].partition('"')[0], "plan": self.text}
        return fields


def compare(gathered: Tensor) -> None:
    """Compare the records of all ranks, [ranks * RECORD_BYTES] on the host.

    Raises:
        ExchangeError: the same on every rank: the records are not of one call, or a rank has failed.
    """
    everything = gathered.numpy().tobytes()
    first, ranks = everything[:RECORD_BYTES], len(everything) // RECORD_BYTES
    if everything == first * ranks and not first[_ERROR]:
        return
    records = [_Read.of(everything[rank * RECORD_BYTES : (rank + 1) * RECORD_BYTES]) for rank in range(ranks)]
    differences = _differences(records)
    if differences:
        raise ExchangeError(differences)


def number_given(record: Tensor) -> int:
    """The number `given` in one rank's record."""
    return _Read.of(record.numpy().tobytes()).given


def failures(of_ranks: Mapping[int, object]) -> str:
    """The message about ranks that failed."""
    lines = [f"  rank {rank}: {error}" for rank, error in of_ranks.items()]
    return "\n".join(["invalid input to a sequence-parallel operation:", *lines])


def _differences(records: Sequence[_Read]) -> str:
    """Describe what differs between the ranks, one line a field; empty if nothing does."""
    failed = {rank: r.shown().get("error") for rank, r in enumerate(records) if r.error}
    if failed:
        return failures(failed)
    lines: list[str] = []

    def note(name: str, values: Sequence[object]) -> None:
        if any(value != values[0] for value in values):
            lines.append(f"  {name}: " + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values)))

    if any(r.plan != records[0].plan or r.documents != records[0].documents for r in records):
        shown = [r.shown() for r in records]
        for key in dict.fromkeys(key for fields in shown for key in fields):
            note(key, [fields.get(key) for fields in shown])
        if not lines:  # beyond what a record has room for
            note("plan", [(r.plan + r.documents).hex() for r in records])
    note("call whose gradients these are", [r.forward or "none" for r in records])
    note("step", [r.step.number for r in records])
    note("data of the step", [r.step.data for r in records])
    for place, sources in enumerate(zip(*(r.sources for r in records), strict=True)):
        if len({source for source in sources if source}) > 1:
            note(f"global tensor that argument {place + 1} is a shard of", [f"{s:016x}" for s in sources])
    if not lines:
        return ""
    calls = [f"  rank {rank}: {record.named()}" for rank, record in enumerate(records)]
    return "\n".join(
        ["the ranks disagree about what to compute; nothing was exchanged:", *calls, "They differ in", *lines]
    )


@lru_cache(maxsize=64)
def _places(shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices at which to sample a tensor: spread over it, in no step that its contents might have."""
    flat = torch.randint(0, max(1, shape.numel()), (64,), generator=torch.Generator().manual_seed(shape.numel()))
    return torch.unravel_index(flat, shape)


def source_of(tensor: Tensor) -> int:
    """A number from 1 to 2^64 - 1 that stands for a tensor: of its shape, its dtype and 64 of its elements."""
    found = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8)
    if tensor.numel():
        places = _places(tensor.shape) if tensor.dim() else ()
        looked_at = tensor.detach()[tuple(index.to(tensor.device) for index in places)]
        found.update(looked_at.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return int.from_bytes(found.digest(), "little") or 1
