"""A process ends as it should, and nothing of PyTorch's is imported in the middle of its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ONE_PROCESS = """
import os, sys
import torch, torch.distributed as dist
import exits, lasp

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
alone = threads()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = set(sys.modules)
for program in exits.PROGRAMS.values():
    sp = lasp.SequenceParallel(dist.group.WORLD)
    program(sp).backward()
    del sp
q = torch.randn(1, 4, 2, 8)
lasp.softmax_attention(q, q, q, initial_state=torch.randn(1, 3, 2, 16))
late = [name for name in set(sys.modules) - before if not name.startswith("lasp")]
assert not late, late
assert threads() > alone
import torch.distributed.nn.functional  # DDP and the compiler do so when they are first used
dist.destroy_process_group()
assert threads() == alone, (alone, threads())
"""


def test_threads_end_with_the_group_and_nothing_is_imported_late() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS], cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def ended(*options: str) -> str:
    command = [sys.executable, "-m", "tests.exits", *options]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ci
def test_programs_end_with_exit_code_0() -> None:
    """Runs over two and over three processes, with and without destroy_process_group."""
    assert ended("--runs", "2", "--fresh", "0", "--programs", "delta_rule").count("1 of 1 ended with exit code 0") == 2


@pytest.mark.exhaustive
def test_programs_end_with_exit_code_0_every_time() -> None:
    ended("--runs", "100")
