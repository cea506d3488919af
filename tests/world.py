"""Real processes over gloo for tests: `run(size, function)` calls `function(rank)` in each and returns the results."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def _worker(rank: int, size: int, store: str, function: Callable[[int], Any], pipe: Any) -> None:
    # Before anything else: a forked child that inherits OpenMP's state hangs on its first parallel region.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        pipe.send((True, function(rank)))
        # A rank that ends takes its unsent messages with it, and a chain's first rank is done long before its last.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        # Without running the parent's exit handlers; a peer may already be gone.
        os._exit(0)


class WorldError(AssertionError):
    """A rank failed; the message holds every failed rank's traceback."""


def torchrun(processes: int = 2) -> list[str]:
    """The start of processes with the static rendezvous, torchrun's default, at a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]


def run(size: int, function: Callable[[int], Any], *, deadline_s: float = 120.0) -> list[Any]:
    """`function(rank)` on `size` forked processes joined by gloo; its results in rank order."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(rank, size, store, function, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        end = time.monotonic() + deadline_s
        answers: list[tuple[bool, Any]] = []
        for pipe in pipes:
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    answers.append((False, f"no answer within {deadline_s} s: it hangs"))
                else:
                    answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "the process died"))
        for process in processes:
            process.kill()
            process.join()
    failed = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(answers) if not good]
    if failed:
        raise WorldError("\n".join(failed))
    return [value for _, value in answers]
