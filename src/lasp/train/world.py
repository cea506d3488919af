"""The processes of a run as the training loop sees them: who am I, who else is there, what did everybody find."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store

from lasp.data.batches import Shard
from lasp.distributed import process_group
from lasp.distributed.comm import Comm, ExchangeError
from lasp.distributed.groups import new_group
from lasp.distributed.mesh import SP_AXIS, build_mesh, data_rank
from lasp.distributed.signals import end_with_parent
from lasp.errors import CheckpointError, ConfigError, DataError, PeerLostError, RunError
from lasp.train.config import TrainConfig
from lasp.train.handshake import compare, description
from lasp.train.progress import PHASES, Progress

# Processes that read or write a checkpoint wait for the slowest disk. That all get on is seen to elsewhere
# (`World.settle`): this deadline only has to be longer than a file may take.
_FILES_TIMEOUT = timedelta(days=1)
# Between two looks at whether the others get on, and how long a process that lost another waits for the rest to say so.
_LOOK_S, _ROLL_CALL_S = 1.0, 3.0


@dataclass
class Place:
    """This process's place in a run, for messages."""

    text: str = "starting"


@dataclass(frozen=True)
class World:
    """This process and the others. With one process there is no mesh and no communication."""

    rank: int
    size: int
    device: torch.device
    shard: Shard
    mesh: DeviceMesh | None = None
    control: Comm | None = None
    """Small messages between all processes, on the host, apart from everything else."""
    files: dist.ProcessGroup | None = None
    """For torch.distributed.checkpoint's plans of who writes and reads what, on the host."""
    owns_group: bool = False
    """The process group was made by `join`, and `leave` ends it."""
    timeout_s: float = 120.0
    """Deadline of a wait for the others, and of work in the background that stands still."""
    place: Place = field(default_factory=Place)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, values: list[float]) -> list[list[float]]:
        """The `values` of every process, by global rank. All must give the same number of them."""
        if self.control is None:
            return [values]
        rows: list[list[float]] = self.control.all_gather(torch.tensor(values, dtype=torch.float64)).wait().tolist()
        return rows

    def compare(self, own: dict[str, Any]) -> None:
        """Raise ConfigError, on every process, unless all give the same; see lasp.train.handshake."""
        if self.control is not None:
            timeout_s = self.control.timeout_s
            compare(own, rank=self.rank, size=self.size, store=_get_default_store(), timeout_s=timeout_s)

    def settle(self, thread: threading.Thread | None, progress: Progress, what: str) -> None:
        """Wait until the work that processes do in the background has ended on all; collective.

        It may take longer than the deadline, as long as something is done within it. thread: of this process's work,
        None if it has none. what: it is, for messages. Raises PeerLostError, on all processes, if one stands still.
        """
        self.place.text = what
        while True:
            if thread is not None:
                thread.join(min(_LOOK_S, self.timeout_s / 4))
            works = thread is not None and thread.is_alive()
            rows = self.gather([float(works), progress.idle_s, float(PHASES.index(progress.phase))])
            working = [rank for rank, row in enumerate(rows) if row[0]]
            if not working:
                return
            late = [rank for rank in working if rows[rank][1] > self.timeout_s]
            to_blame = [rank for rank in late if rows[rank][2] > 0] or (late if len(late) == len(rows) else [])
            if to_blame:
                rank, (_, idle_s, phase) = to_blame[0], rows[to_blame[0]]
                raise PeerLostError(f"{what}: rank {rank} has stood still for {idle_s:.0f} s, {PHASES[int(phase)]}")

    def run_on_first(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `work` on the first process and return its (JSON-able) result on all.

        It may take longer than the deadline of a wait: the first process keeps telling the others that it is
        alive. If it raises, all processes raise.
        """
        if self.control is None:
            return work()
        record: dict[str, Any] = {"state": "working"}
        failure: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            nonlocal record
            try:
                record = {"state": "done", "result": work()}
            except BaseException as error:
                failure.append(error)
                record = {"state": "failed", "error": f"{error}", "code": getattr(error, "exit_code", 1)}
            done.set()

        if self.is_first:
            threading.Thread(target=run, daemon=True).start()
        while True:
            done.wait(self.control.timeout_s / 4 if self.is_first else 0)
            record = self._from_first(record)
            if record["state"] == "done":
                return dict(record["result"])
            if record["state"] == "failed":
                if failure:
                    raise failure[0]
                kinds = {cls.exit_code: cls for cls in (ConfigError, CheckpointError, DataError)}
                raise kinds.get(record["code"], RunError)(f"the first process failed: {record['error']}")

    def _from_first(self, record: dict[str, Any]) -> dict[str, Any]:
        assert self.control is not None
        text = bytearray(json.dumps(record).encode())
        length = int(self.control.broadcast(torch.tensor([len(text)]), 0))
        buffer = torch.frombuffer(text, dtype=torch.uint8) if self.is_first else torch.zeros(length, dtype=torch.uint8)
        return dict(json.loads(bytes(self.control.broadcast(buffer, 0).tolist())))


def join(config: TrainConfig, resume: Path | None = None) -> World:
    """Join the processes that a launcher started (RANK and WORLD_SIZE), or be the only one.

    An existing process group is used as it is. Raises ConfigError if the layout does not fit the processes, and on
    every process if they were started with different options (lasp.train.handshake).
    """
    owns_group = not dist.is_initialized()
    size = int(os.environ.get("WORLD_SIZE", "1")) if owns_group else dist.get_world_size()
    rank = dist.get_rank() if not owns_group else int(os.environ["RANK"]) if size > 1 else 0
    problem, device = None, torch.device("cpu")
    try:
        config.validate(size)  # before anything is connected
        if "RANK" in os.environ:
            end_with_parent()  # as those of several do, when they meet
        device = _device(config.device)
    except ConfigError as error:
        if size == 1:
            raise
        problem = error
    # What cannot be a deadline is a problem that all are told of.
    timeout_s = config.parallel.timeout_s if 0 < config.parallel.timeout_s < math.inf else 120.0
    timeout = timedelta(seconds=timeout_s)
    if size > 1:
        store = process_group.meet(rank, size, timeout) if owns_group else _get_default_store()
        own = {"error": str(problem)} if problem is not None else description(config, resume, device.type)
        compare(own, rank=rank, size=size, store=store, timeout_s=timeout_s)
        if owns_group:
            process_group.make(device, store, rank, size, timeout)
    if not dist.is_initialized():
        return World(0, 1, device, Shard(), timeout_s=timeout_s)
    mesh = build_mesh(
        sp=config.parallel.sp,
        dp=config.parallel.dp,
        dp_replicate=config.parallel.dp_replicate,
        device_type=device.type,
        timeout_s=timeout_s,
    )
    dp_rank, dp_size = data_rank(mesh)
    shard = Shard(
        dp_rank=dp_rank,
        dp_size=dp_size,
        sp_rank=mesh.get_local_rank(SP_AXIS),
        sp_size=mesh[SP_AXIS].size(),
    )
    control = files = None
    if dist.get_world_size() > 1:
        files = new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        # Only what the group does takes long, not meeting in it. PyTorch 2.14 has a public name for it.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(_FILES_TIMEOUT, files)
        hosts = new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        control = Comm(hosts, timeout_s)
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, device, shard, mesh, control, files, owns_group, timeout_s)


@contextmanager
def naming_lost_peers(world: World) -> Iterator[None]:
    """Errors that another process's end causes within become PeerLostError: nobody looks for their cause here."""
    try:
        yield
    except RuntimeError as error:
        # The exchange says so itself; DDP's sums and NCCL fail with errors of their own.
        if world.size > 1 and (isinstance(error, ExchangeError | dist.DistError) or "gloo/" in str(error)):
            silent = ", ".join(map(str, _silent(world)))
            who = f"rank {silent} does not answer" if silent else "it has ended, or came too late"
            raise PeerLostError(
                f"rank {world.rank} lost another process, {world.place.text}: {who}: {error}"
            ) from error
        raise


def _silent(world: World) -> list[int]:
    """The processes that do not say, while others do, that they lost another; none if that cannot be found out."""
    absent: list[int] = []

    def call() -> None:
        store = dist.PrefixStore("roll-call", dist.distributed_c10d._get_default_store())
        store.set(str(world.rank), world.place.text)
        end = time.monotonic() + _ROLL_CALL_S
        while time.monotonic() < end:
            absent[:] = [rank for rank in range(world.size) if not store.check([str(rank)])]
            time.sleep(0.1)

    def quietly() -> None:
        with suppress(RuntimeError):  # the store is gone too
            call()

    # Apart: whoever keeps the store may be the one that does not answer.
    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(2 * _ROLL_CALL_S)
    return [] if len(absent) == world.size else list(absent)


def leave(world: World) -> None:
    """Undo `join`."""
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count()
    if name == "cuda" and num_gpus < local_size:
        raise ConfigError(
            f"--device cuda needs one GPU for each of the {local_size} processes here, found {num_gpus}: "
            "start fewer processes or use --device cpu"
        )
    if name == "cpu" or num_gpus < local_size:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
