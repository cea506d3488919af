"""The ranks that share a sequence, and the tokens that each holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.util import find_spec
from math import inf
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.distributed.call import Call, Calls
from lasp.distributed.comm import Comm, Counters
from lasp.distributed.record import Description, ExchangeError, RecordedStep, digest_of, source_of
from lasp.distributed.sealed import SealedCalls, Stamps, TorchStamps
from lasp.exchange import Exchange, resolve
from lasp.exchange.start import SequenceCall, is_replaying, register
from lasp.sequence.arguments import check_tensor, number, whole, wholes

_START = "start the program with torchrun and call torch.distributed.init_process_group() first"
_MAX_DESCRIBED = 1024
# The attribute of a shard that says which tensor it is of.
_SOURCE = "_lasp_source"


class SequenceParallel:
    """A group of ranks that hold consecutive, contiguous shards of the same sequences.

    Rank 0 of the group holds the first tokens. Constructing it is collective over the group. Several groups may
    exist side by side; each rank passes its own.

    Args:
        group: a process group (its type allows None, which `torch.distributed.group.WORLD` is before there is one), or
            a one-dimensional DeviceMesh.
        lengths: tokens of every rank, in order, of any size, zero too; None where all ranks hold equally many.
        exchange: how the state crosses ranks: "ring" (LASP, arXiv 2404.02882), "all_gather" (LASP-2,
            arXiv 2502.07563), "auto", or an `Exchange`.
        timeout_s: seconds after which a rank stops waiting for another and raises `ExchangeError`. Over NCCL
            the waits of the exchange itself obey the process group's own timeout.

    Raises:
        ValueError: no process group exists, the mesh has several dimensions, this process is not in the group,
            `lengths` does not have one entry a rank, `exchange` is unknown, or `timeout_s` is not above 0. Also if
            it is copied or pickled.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        *,
        lengths: Sequence[int] | None = None,
        exchange: str | Exchange = "auto",
        timeout_s: float = 300.0,
    ) -> None:
        timeout_s = number("timeout_s", timeout_s, "a number of seconds > 0", lambda seconds: 0 < seconds < inf)
        comm = Comm(_process_group(group), timeout_s)
        self.comm = comm
        self.calls = Calls(comm)
        if comm.backend == "nccl" and comm.size > 1:
            self.calls = SealedCalls(comm, torch.device("cuda", torch.cuda.current_device()), _stamps())
        self.exchange = resolve(exchange, comm.size, comm.backend)
        self.lengths = _checked_lengths(lengths, comm.size)
        self._described: dict[Hashable, Description] = {}
        self.choices: dict[Hashable, Exchange] = {}
        """Schedules that "auto" has chosen, by what they carry; all ranks carry the same."""
        self.key = register(self)

    def with_lengths(self, lengths: Sequence[int] | None) -> SequenceParallel:
        """The same ranks and groups, with other shard lengths. Not collective."""
        other = object.__new__(SequenceParallel)
        other.comm, other.calls, other.exchange, other.choices = self.comm, self.calls, self.exchange, self.choices
        other._described = {}
        other.lengths = _checked_lengths(lengths, self.size)
        other.key = register(other)
        return other

    def begin_step(self, number: int, data: object = None) -> None:
        """Say which step of the program follows. Ranks that are at different ones raise at their next call.

        Nothing is sent here: what the ranks exchange from now on belongs to this step.

        Args:
            number: of the step, from 0.
            data: what stands for its data, such as a position or a digest, the same on every rank; any repr will do.

        Raises:
            ValueError: `number` is none.
        """
        number = whole("number", number, 0)
        digest = -1 if data is None else int.from_bytes(digest_of(repr(data))[:7], "little")
        self.comm.step = RecordedStep(number, digest)

    def call(
        self,
        operator: str,
        key: Hashable,
        fields: Callable[[], Mapping[str, object]],
        documents: str | None = None,
        inputs: Sequence[Tensor | None] = (),
        *,
        replays: bool = False,
    ) -> SequenceCall | None:
        """Begin an operator's forward pass: the other ranks are told which it is, and what is sent is part of it.

        Args:
            key: what stands for `fields` on this rank.
            fields: gives what must be the same on all ranks besides the documents, to be called when the key is new.
            documents: what stands for the packed documents (`lasp.sequence.shards.document_digest`).
            inputs: the tensors given; shards that `shard` made are compared by the tensors that they are of.
            replays: a recomputation takes what the operator's exchanges brought from what was kept, and tells nobody.

        Returns:
            None where there are no other ranks.
        """
        if self.size == 1:
            return None
        if replays and is_replaying():
            return SequenceCall(self.rank, None, is_forward=True)
        description = self._written(operator, key, fields)
        sources = [getattr(tensor, _SOURCE, 0) for tensor in inputs]
        return SequenceCall(self.rank, self.calls.begin(description, documents, sources=sources), is_forward=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in their order. All of them must call, with tensors of one shape and dtype."""
        with broadcast_errors(self):
            check_tensor("tensor", tensor, "to sum")
        return tensor if self.size == 1 else self._alone("sum", tensor).sum(tensor)

    def _alone(self, operator: str, tensor: Tensor, **fields: object) -> Call:
        """The call of a single message."""
        shape, dtype = tuple(tensor.shape), str(tensor.dtype)
        key = (shape, dtype, *fields.values())
        return self.calls.begin(self._written(operator, key, lambda: {"shape": shape, "dtype": dtype, **fields}))

    @property
    def rank(self) -> int:
        """This process's rank within the group."""
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def counters(self) -> Counters:
        """Bytes and messages exchanged so far by this rank."""
        return self.comm.counters

    def offset(self, tokens: int) -> int:
        """The global index of this rank's first token, where this rank holds `tokens` of the sequence."""
        return self.rank * tokens if self.lengths is None else sum(self.lengths[: self.rank])

    def total(self, tokens: int) -> int:
        """Tokens of the whole sequence, of which this rank holds `tokens`."""
        return self.size * tokens if self.lengths is None else sum(self.lengths)

    def shard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a global tensor along `dim`: `lengths`, or equal parts.

        The tensor must be the same on every rank. Over gloo an operator that is given parts of different ones raises
        `ExchangeError` on all ranks.

        Raises:
            ValueError: the dim does not divide into equal parts, or is not as long as `lengths` says.
        """
        check_tensor("tensor", tensor, "of the whole sequence")
        if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(f"dim must be one of a tensor of shape {tuple(tensor.shape)}, got {dim!r}")
        total = tensor.shape[dim]
        if self.lengths is None:
            if total % self.size:
                raise ValueError(
                    f"{total} tokens do not divide into {self.size} equal shards; pass lengths= to "
                    f"SequenceParallel, for example {balanced_lengths(total, self.size)}"
                )
            each = total // self.size
            return self._marked(tensor, tensor.narrow(dim, self.rank * each, each))
        if total != sum(self.lengths):
            raise ValueError(f"the tensor has {total} tokens but lengths sum to {sum(self.lengths)}")
        return self._marked(tensor, tensor.narrow(dim, self.offset(0), self.lengths[self.rank]))

    def _marked(self, whole: Tensor, part: Tensor) -> Tensor:
        """`part`, by which an operator that is given it knows which tensor it is of. On a GPU that other ranks are
        reached from without the host nothing is read."""
        if torch.compiler.is_compiling() or self.size == 1 or self.comm.backend != "gloo":
            return part
        if type(whole) in (Tensor, torch.nn.Parameter) and whole.device.type in ("cpu", "cuda"):
            setattr(part, _SOURCE, source_of(whole))
        return part

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` of group rank `source` on every rank; elsewhere it gives the shape, dtype and device."""
        with broadcast_errors(self):
            check_tensor("tensor", tensor, "to send or of its shape")
            if whole("source", source, 0) >= self.size:
                raise ValueError(f"source must be one of the {self.size} ranks, got {source}")
        return tensor if self.size == 1 else self._alone("broadcast", tensor, source=source).broadcast(tensor, source)

    def _written(self, operator: str, key: Hashable, fields: Callable[[], Mapping[str, object]]) -> Description:
        """The description of an operator's call that the ranks compare, written out once for every key.

        fields: gives what must be the same on every rank, besides the schedule and the shards' lengths.
        """
        description = self._described.get((operator, key))
        if description is None:
            if len(self._described) >= _MAX_DESCRIBED:
                self._described.clear()
            whole = {**fields(), "exchange": self.exchange.name, "lengths": self.lengths}
            description = self._described[operator, key] = Description(operator, whole)
        return description

    def failed(self, error: Exception) -> ExchangeError:
        """Tell the other ranks of invalid input, without waiting for them; what to raise here.

        They raise the same, at the call for which they wait or at their next.
        """
        return self.comm.failed(str(error))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a SequenceParallel stands for process groups of this process and can be neither copied nor pickled: hand "
            "on the same one, or with_lengths() of it for other shards"
        )

    def __repr__(self) -> str:
        return f"SequenceParallel(rank {self.rank} of {self.size}, exchange={self.exchange.name})"


class broadcast_errors:
    """Tell the other ranks of a ValueError raised inside, so that they do not wait for this one.

    A class, because contextlib's way takes a microsecond of every operator.

    Raises:
        ExchangeError: instead of the ValueError where there are other ranks: the same as theirs.
    """

    def __init__(self, sp: SequenceParallel | None) -> None:
        self._sp = sp

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ValueError) and isinstance(self._sp, SequenceParallel) and self._sp.size > 1:
            raise self._sp.failed(error) from error


def check_shard(sp: SequenceParallel | None, tokens: int) -> None:
    """Check that this rank holds as many tokens as `sp` says.

    Raises:
        ValueError: it does not, or `sp` is something else.
    """
    if sp is None:
        return
    if not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel or None, got {type(sp).__name__}")
    if sp.lengths is not None and tokens != sp.lengths[sp.rank]:
        raise ValueError(f"rank {sp.rank} must hold lengths[{sp.rank}] = {sp.lengths[sp.rank]} tokens, got {tokens}")


def _stamps() -> Stamps:
    """Kernels where Triton is installed, else PyTorch's operations, some ten times as many."""
    if find_spec("triton") is None:
        return TorchStamps()
    from lasp.kernels.triton.messages.stamps import TritonStamps

    stamps: Stamps = TritonStamps()
    return stamps


def balanced_lengths(tokens: int, size: int) -> tuple[int, ...]:
    """Shard lengths that differ by at most one token."""
    return tuple(tokens // size + (rank < tokens % size) for rank in range(size))


def _checked_lengths(lengths: Sequence[int] | None, size: int) -> tuple[int, ...] | None:
    if lengths is None:
        return None
    lengths = wholes("lengths", lengths)
    if len(lengths) != size or any(n < 0 for n in lengths):
        raise ValueError(f"lengths must hold one number of tokens >= 0 for each of the {size} ranks, got {lengths}")
    return lengths


def _process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"SequenceParallel needs a process group, and none exists: {_START}")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"SequenceParallel needs a one-dimensional mesh, got dims {group.mesh_dim_names or group.ndim}: "
                'pass one dim of it, for example mesh["sp"]'
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed ProcessGroup or a one-dimensional DeviceMesh, got "
            f"{type(group).__name__}; this process may not be a member of the group that was made"
        )
    return group
