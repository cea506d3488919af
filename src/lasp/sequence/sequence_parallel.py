"""Which ranks share a sequence, and which of its tokens each holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import inf
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.algebra import Summary
from lasp.distributed.comm import Comm, Counters
from lasp.exchange import Exchange, PendingExchange, resolve
from lasp.recurrence.across import register
from lasp.sequence.arguments import check_tensor, number, wholes
from lasp.sequence.carry import carry

_START = "start the program with torchrun and call torch.distributed.init_process_group() first"
_MAX_AGREED = 1024


class SequenceParallel:
    """A group of ranks that hold consecutive, contiguous shards of the same sequences.

    Rank 0 of the group holds the first tokens. Constructing it is collective over the group. Several groups may
    exist side by side; each rank passes its own.

    Args:
        group: a process group, or a one-dimensional DeviceMesh.
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
        group: dist.ProcessGroup | DeviceMesh,
        *,
        lengths: Sequence[int] | None = None,
        exchange: str | Exchange = "auto",
        timeout_s: float = 300.0,
    ) -> None:
        timeout_s = number("timeout_s", timeout_s, "a number of seconds > 0", lambda seconds: 0 < seconds < inf)
        comm = Comm(_process_group(group), timeout_s)
        self.comm = comm
        self.exchange = resolve(exchange, comm.size, comm.backend)
        self.lengths = _checked_lengths(lengths, comm.size)
        self._agreed: set[Hashable] = set()
        self.choices: dict[Hashable, Exchange] = {}
        """Schedules that "auto" has chosen, by what they carry; all ranks carry the same."""
        self.key = register(self)

    def with_lengths(self, lengths: Sequence[int] | None) -> SequenceParallel:
        """The same ranks and groups, with other shard lengths. Not collective."""
        other = object.__new__(SequenceParallel)
        other.comm, other.exchange, other.choices, other._agreed = self.comm, self.exchange, self.choices, set()
        other.lengths = _checked_lengths(lengths, self.size)
        other.key = register(other)
        return other

    def begin(
        self, x: Any, summary: Summary, initial: Tensor | None, *, reverse: bool = False, want_total: bool = False
    ) -> PendingExchange:
        """Start to carry the state over the ranks; see `lasp.recurrence.across.Across`."""
        return carry(self, x, summary, initial, reverse, want_total)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, added in their order."""
        return self.comm.sum(tensor)

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
            return tensor.narrow(dim, self.rank * (total // self.size), total // self.size)
        if total != sum(self.lengths):
            raise ValueError(f"the tensor has {total} tokens but lengths sum to {sum(self.lengths)}")
        return tensor.narrow(dim, self.offset(0), self.lengths[self.rank])

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` of group rank `source` on every rank; elsewhere it gives the shape, dtype and device."""
        return self.comm.broadcast(tensor, source)

    def has_agreed(self, key: Hashable) -> bool:
        """Whether the ranks have agreed on what this rank described under this key."""
        return self.size == 1 or key in self._agreed

    def agree(self, description: Mapping[str, object], key: Hashable = None) -> None:
        """Compare, once for every new description, what the ranks are about to do; see `Comm.agree`.

        key: what stands for the description on this rank, the description itself by default.
        """
        key = tuple(description.values()) if key is None else key
        if not self.has_agreed(key):
            self.comm.agree({**description, "exchange": self.exchange.name, "lengths": self.lengths})
            # Bounded: documents change every step. All ranks describe the same, so all forget at the same call.
            if len(self._agreed) >= _MAX_AGREED:
                self._agreed.clear()
            self._agreed.add(key)

    def report_error(self, error: Exception) -> None:
        """Tell the other ranks of invalid input, if they are known to be waiting to agree on a first plan."""
        if self.size > 1 and not self._agreed:
            self.comm.agree({"error": str(error)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(
            "a SequenceParallel stands for process groups of this process and can be neither copied nor pickled: hand "
            "on the same one, or with_lengths() of it for other shards"
        )

    def __repr__(self) -> str:
        return f"SequenceParallel(rank {self.rank} of {self.size}, exchange={self.exchange.name})"


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


def _process_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
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
