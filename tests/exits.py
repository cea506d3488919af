"""Programs over several processes end with exit code 0, every time: `python -m tests.exits --runs 200`.

A thread of gloo's that outlives its group aborts the process now and then, after all results are there. It is a race,
so it takes many runs to see. Each run is a program of one operator over two or three real processes that ends as
Python programs end: exit handlers, then the interpreter's finalisation; every second one without
`destroy_process_group`. To be cheap the processes are forked from one that has imported everything and run nothing;
--fresh starts as many programs anew. A run that takes longer than --deadline is ended with its processes' stacks, and
with the time that each of them had of a CPU: on a busy machine it may have waited for no more than that.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lasp
import lasp.kernels.torch  # forked processes inherit what they would load each

SWITCH_S = 60.0
BOUNDS = {1: [0, 3, 20], 2: [0, 3, 17, 30, 40], 3: [0, 3, 17, 30, 45, 60]}


def _heads(sp: lasp.SequenceParallel, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(1, 20, *shape).requires_grad_() for _ in range(3)]


def linear_attention(sp: lasp.SequenceParallel) -> torch.Tensor:
    q, k, v = _heads(sp, 2, 8)
    g = torch.full((2,), -0.01)
    o, final = lasp.linear_attention(q, k, v, g, output_final_state=True, sp=sp)
    return o.sum() + final.sum()


def delta_rule(sp: lasp.SequenceParallel) -> torch.Tensor:
    """Packed."""
    q, k, v = _heads(sp, 2, 8)
    k = torch.nn.functional.normalize(k, dim=-1)
    o, final = lasp.delta_rule(
        q, k, v, torch.rand(1, 20, 2), cu_seqlens=BOUNDS[sp.size], output_final_state=True, sp=sp
    )
    return o.sum() + final.sum()


def short_convolution(sp: lasp.SequenceParallel) -> torch.Tensor:
    x, weight = torch.randn(1, 20, 6).requires_grad_(), torch.randn(6, 4).requires_grad_()
    return lasp.short_convolution(x, weight, cu_seqlens=BOUNDS[sp.size], sp=sp)[0].sum()


def token_shift(sp: lasp.SequenceParallel) -> torch.Tensor:
    return lasp.token_shift(torch.randn(1, 20, 6).requires_grad_(), sp=sp)[0].sum()


def softmax_gather(sp: lasp.SequenceParallel) -> torch.Tensor:
    q, k, v = _heads(sp, 6, 8)
    return lasp.softmax_attention(q, k, v, method="all_gather", sp=sp)[0].sum()


def softmax_ulysses(sp: lasp.SequenceParallel) -> torch.Tensor:
    q, k, v = _heads(sp, 6, 8)
    return lasp.softmax_attention(q, k, v, method="ulysses", sp=sp)[0].sum()


PROGRAMS: dict[str, Callable[[lasp.SequenceParallel], torch.Tensor]] = {
    program.__name__: program
    for program in (linear_attention, delta_rule, short_convolution, token_shift, softmax_gather, softmax_ulysses)
}


def run(name: str, rank: int, size: int, store: str, destroys: bool) -> None:
    """One process of a program."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(rank)
    for exchange in ("auto", "all_gather"):
        sp = lasp.SequenceParallel(dist.group.WORLD, exchange=exchange, timeout_s=60)
        PROGRAMS[name](sp).backward()
    # What else wants the interpreter's lock from now on waits until this thread waits or ends: the race is hard to win.
    # The last thing done is a collective of gloo's; its threads want the lock when it is over.
    sys.setswitchinterval(SWITCH_S)
    sp.sum(torch.zeros(1))
    if destroys:
        dist.destroy_process_group()


class Run:
    """The processes of one run under way."""

    def __init__(self, name: str, size: int, destroys: bool, fresh: bool, folder: Path) -> None:
        self.what = f"{name} over {size}, {'with' if destroys else 'without'} destroy_process_group"
        self.began, self.folder = time.monotonic(), folder
        self.codes: dict[Any, Any] = {}
        self.is_late = False
        self._started: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        start = self._start if fresh else self._fork
        self.pids = {start(name, rank, size, destroys): rank for rank in range(size)}

    def _fork(self, name: str, rank: int, size: int, destroys: bool) -> int:
        pid = os.fork()
        if pid == 0:
            with open(self.folder / f"{rank}.err", "wb") as errors:
                os.dup2(errors.fileno(), 2)
            faulthandler.enable()
            run(name, rank, size, str(self.folder / "store"), destroys)
            sys.exit(0)
        return pid

    def _start(self, name: str, rank: int, size: int, destroys: bool) -> int:
        arguments = [name, str(rank), str(size), str(self.folder / "store"), str(int(destroys))]
        with open(self.folder / f"{rank}.err", "wb") as errors:
            command = [sys.executable, "-X", "faulthandler", __file__, "--process", *arguments]
            # Kept: whatever Popen starts next would wait for one that was forgotten, and its exit code be lost.
            self._started.append(subprocess.Popen(command, stderr=errors))
            return self._started[-1].pid

    def ended(self, pid: int, status: int) -> None:
        self.codes[self.pids[pid]] = os.waitstatus_to_exitcode(status)

    @property
    def is_over(self) -> bool:
        return len(self.codes) == len(self.pids)

    def end_if_late(self, deadline_s: float) -> None:
        """Have each process print its stacks and abort, once."""
        if self.is_late or time.monotonic() - self.began < deadline_s:
            return
        self.is_late = True
        for pid, rank in self.pids.items():
            if rank not in self.codes:
                had = f"{deadline_s:g} s and {_cpu_seconds(pid):.1f} s of a CPU"
                print(f"{self.what}: rank {rank} is ended after {had}")
                os.kill(pid, signal.SIGABRT)


def _cpu_seconds(pid: int) -> float:
    """Seconds that a process, not yet waited for, has had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of each program, half of them over 3 processes")
    parser.add_argument("--fresh", type=int, default=4, help="of them, how many start Python anew")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--deadline", type=float, default=300, help="seconds of one run")
    parser.add_argument("--programs", nargs="*", choices=sorted(PROGRAMS), default=sorted(PROGRAMS))
    parser.add_argument("--process", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        name, rank, size, store, destroys = options.process
        run(name, int(rank), int(size), store, bool(int(destroys)))
        return 0
    waiting = [
        (name, 2 + number // 2 % 2, number % 2 == 0, number < options.fresh)
        for number in range(options.runs)
        for name in options.programs
    ]
    parent, root = os.getpid(), Path(tempfile.mkdtemp(prefix="lasp-exits-"))
    under_way: list[Run] = []
    counts, failed, started = Counter[str](), Counter[str](), 0
    try:
        while waiting or under_way:
            while waiting and len(under_way) < options.jobs:
                under_way.append(Run(*waiting.pop(0), root / str(started)))
                started += 1
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.01)
                for each in under_way:
                    each.end_if_late(options.deadline)
                continue
            each = next(each for each in under_way if pid in each.pids)
            each.ended(pid, status)
            if each.is_over:
                under_way.remove(each)
                counts[each.what] += 1
                if any(each.codes.values()):
                    failed[each.what] += 1
                    print(f"{each.what}: exit codes {dict(sorted(each.codes.items()))}")
                    for path in sorted(each.folder.glob("*.err")):
                        print(path.read_text(errors="replace")[-3000:], end="", flush=True)
                shutil.rmtree(each.folder)
    finally:
        if os.getpid() == parent:  # a forked process passes here on its way out
            shutil.rmtree(root, ignore_errors=True)
    for what, number in sorted(counts.items()):
        print(f"{what}: {number - failed[what]} of {number} ended with exit code 0")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
