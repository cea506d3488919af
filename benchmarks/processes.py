"""Processes joined by gloo for the scripts here: `run(size, function)` calls `function(rank)` in each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any


def _worker(rank: int, size: int, store: str, function: Callable[[int], Any], pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    # Before anything else: a forked child that inherits OpenMP's state hangs on its first parallel region.
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        answer = True, function(rank)
        dist.barrier()
        pipe.send(answer)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)


def run(size: int, function: Callable[[int], Any], *, deadline_s: float = 600.0) -> list[Any]:
    """`function(rank)` on `size` forked processes with one thread each; its results in rank order.

    Raises:
        RuntimeError: a process failed or did not answer in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, size, f"{folder}/store", function, theirs)
            processes.append(context.Process(target=_worker, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            answers = [pipe.recv() if pipe.poll(deadline_s) else (False, "no answer in time") for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failed = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(answers) if not good]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in answers]
