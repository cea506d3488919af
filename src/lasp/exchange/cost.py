"""The time of an exchange as a sum of elementary operations, and the constants of those.

Every schedule states its time with the methods of `Model`; see its `seconds`. All times are those of the rank that
finishes last, with nothing to hide behind: what a schedule costs when local work hides none of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lasp import files
from lasp.exchange.payload import Payload


class Link(NamedTuple):
    """An operation takes latency_s + bytes / bytes_per_s, and step_s for every other rank that takes part."""

    latency_s: float
    bytes_per_s: float
    step_s: float = 0.0

    def seconds(self, nbytes: float, others: int = 0) -> float:
        return self.latency_s + self.step_s * others + nbytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Measured links and speeds of a group of ranks. Bytes are those that one rank receives.

    Attributes:
        message: one message to the next rank while the others wait, as in a chain.
        shift: every rank sends one message and receives one, at the same time.
        gather, all_to_all, broadcast: the collectives.
        across: one message to a rank on another host.
        peer: every rank writes into every other rank's memory; None where they cannot.
        apply_summary, apply_summary_alone: to a state of so many bytes, without matrix products, on all ranks at once
            and on one while the others wait. They differ where ranks share cores or memory.
        flops_per_s: of matrix products in the state's dtype, for dense transitions.
        source: where the numbers come from, for the reader.
    """

    message: Link
    shift: Link
    gather: Link
    all_to_all: Link
    broadcast: Link
    across: Link
    apply_summary: Link
    apply_summary_alone: Link
    flops_per_s: float
    source: str
    peer: Link | None = None

    def save(self, path: Path | str) -> None:
        files.write_output(Path(path), json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Constants:
        """The constants that `save` wrote.

        Raises:
            ValueError: the file does not hold them.
        """
        try:
            values = files.read_json(Path(path), follow=True)
            values = {_EARLIER.get(name, name): value for name, value in values.items()}
            links: dict[str, Any] = {name: _link(values.pop(name)) for name in LINKS}
            peer = values.pop("peer", None)
            links["peer"] = None if peer is None else _link(peer)
            return cls(**links, flops_per_s=_positive(values.pop("flops_per_s")), **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} does not hold constants of an exchange ({error}); write it with `lasp bench exchange --save`"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Eight characters that differ where the numbers do: ranks must choose by the same constants."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:8]


LINKS = tuple(field.name for field in dataclasses.fields(Constants) if field.type == "Link")
# Names in files of earlier versions.
_EARLIER = {"swap": "all_to_all", "fold": "apply_summary", "fold_alone": "apply_summary_alone"}

# Starting points, for groups that were not measured. gloo's are rounded from 2 to 8 processes on a two-core machine.
# NCCL's are times of the GPU, not of the host that launches: message, gather and peer from whole exchanges on two H100s
# in CUDA graphs (docs/results/exchanges.md), the others assumed, across for one 400 Gbit/s adapter a rank.
GLOO = Constants(
    message=Link(200e-6, 2e9),
    shift=Link(150e-6, 1e9, 150e-6),
    gather=Link(200e-6, 0.4e9, 400e-6),
    all_to_all=Link(300e-6, 0.5e9, 500e-6),
    broadcast=Link(200e-6, 1e9, 400e-6),
    across=Link(200e-6, 1e9),
    apply_summary=Link(100e-6, 1.5e9),
    apply_summary_alone=Link(80e-6, 2e9),
    flops_per_s=50e9,
    source="defaults for gloo",
)
NCCL = Constants(
    message=Link(12e-6, 200e9),
    shift=Link(14e-6, 200e9),
    gather=Link(16e-6, 250e9, 1e-6),
    all_to_all=Link(18e-6, 250e9, 1e-6),
    broadcast=Link(16e-6, 200e9, 0.5e-6),
    across=Link(20e-6, 40e9),
    apply_summary=Link(12e-6, 1e12),
    apply_summary_alone=Link(12e-6, 1e12),
    flops_per_s=30e12,
    source="defaults for NCCL",
    peer=Link(15e-6, 250e9, 0.5e-6),
)


def defaults(backend: str) -> Constants:
    """The starting point for a backend of torch.distributed."""
    return NCCL if backend == "nccl" else GLOO


class Model:
    """Times of the elementary operations for one load in one group.

    Args:
        load: what is exchanged.
        nodes: how many consecutive ranks share a host, host after host.
        constants: of the group.
    """

    def __init__(self, load: Payload, nodes: tuple[int, ...], constants: Constants) -> None:
        self.load, self.nodes, self.constants = load, nodes, constants
        self.size = sum(nodes)

    def chain(self, nbytes: float) -> float:
        """A message from the first rank to the last, one neighbour after the other."""
        between = len(self.nodes) - 1
        c = self.constants
        return (self.size - 1 - between) * c.message.seconds(nbytes) + between * c.across.seconds(nbytes)

    def send(self, nbytes: float, senders: int | None = None) -> float:
        """Seconds in which so many ranks, by default all but the last, send one message each at the same time."""
        c = self.constants
        # Between one pair and all pairs: where ranks share cores or wires, each more makes it slower.
        most = self.size - 1
        share = ((senders or most) - 1) / (most - 1) if most > 1 else 0.0
        seconds = c.message.seconds(nbytes) * (1 - share) + c.shift.seconds(nbytes, most) * share
        return seconds if len(self.nodes) == 1 else max(seconds, c.across.seconds(nbytes))

    def gather(self, nbytes: float) -> float:
        return self._collective(self.constants.gather, nbytes)

    def all_to_all(self, nbytes: float) -> float:
        return self._collective(self.constants.all_to_all, nbytes)

    def broadcast(self, nbytes: float) -> float:
        return self._collective(self.constants.broadcast, nbytes)

    def peer(self, nbytes: float) -> float:
        """Never, where ranks cannot write into each other's memory."""
        link = self.constants.peer
        return math.inf if link is None or len(self.nodes) > 1 else link.seconds(nbytes, self.size - 1)

    def apply_summary(self, load: Payload | None = None, *, alone: bool = False) -> float:
        """Apply a summary, on all ranks at once or on one alone."""
        load = self.load if load is None else load
        # Of two ranks only one has something to apply.
        link = self.constants.apply_summary_alone if alone or self.size == 2 else self.constants.apply_summary
        seconds = link.seconds(load.state_bytes)
        if load.is_dense:
            seconds += 2 * load.heads * load.keys**2 * load.values / self.constants.flops_per_s
        return seconds

    def compose(self) -> float:
        """Compose two summaries."""
        load = self.load
        seconds = self.apply_summary()
        if load.is_dense:
            seconds += 2 * load.heads * load.keys**3 / self.constants.flops_per_s
        return seconds

    def pipeline(self, blocks: int) -> float:
        """A state streams down the chain in blocks, (size - 2 + P)(a + b / P) for P blocks; one is the plain chain."""
        state, c = self.load.state_bytes, self.constants
        if blocks == 1:
            return self.chain(state) + (self.size - 1) * self.apply_summary(alone=True)
        stage = (
            self.send(state / blocks)
            + c.apply_summary.latency_s
            + (self.apply_summary() - c.apply_summary.latency_s) / blocks
        )
        return (self.size - 2 + blocks) * stage

    def best_blocks(self) -> int:
        """The number of blocks, a power of two, in which a state streams down the chain fastest."""
        most = max(self.load.heads, self.load.values)
        return min((2**power for power in range(most.bit_length())), key=self.pipeline)

    def _collective(self, link: Link, nbytes: float) -> float:
        if len(self.nodes) > 1:
            across = self.constants.across
            link = Link(
                max(link.latency_s, across.latency_s),
                min(link.bytes_per_s, across.bytes_per_s),
                max(link.step_s, across.latency_s / 4),
            )
        return link.seconds(nbytes, self.size - 1)


def _link(values: Any) -> Link:
    link = Link(**values) if isinstance(values, dict) else Link(*values)
    if not (link.latency_s >= 0 and link.step_s >= 0 and link.bytes_per_s > 0):
        raise ValueError(f"a link needs times >= 0 and bytes_per_s > 0, got {link}")
    return link


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError(f"flops_per_s must be > 0, got {value}")
    return float(value)
