"""Shared set-up: fresh memory is NaN, so that a kernel which reads what it never wrote is seen."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from gpus import ON_GPUS, uses_gpus

# Forked ranks hang on OpenMP threads that their parent had; and tensors here are small.
torch.set_num_threads(1)
# Ranks and programs of tests are forks, and no fork of a process that has looked at a GPU goes backward: tests run as
# on a machine without GPUs, or only those run that use them and fork nothing (`make gpu`).
if not ON_GPUS:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
# Read when Triton is first imported, which any test may do: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Autograd counts devices once, at its first backward pass, and starts a thread for each; forks of a process that
    # has such threads cannot go backward. In a PyTorch for CUDA fake tensors claim eight GPUs: the first pass is here.
    torch.ones((), requires_grad=True).backward()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than cores: tests of several processes wait for each other, for files and for deadlines."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_GPUS and (others := [item for item in items if not uses_gpus(item.path)]):
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if uses_gpus(item.path)]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    # On a GPU a few of the reference's operations have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.manual_seed(0)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Ctrl-C and SIGHUP as a terminal's programs have them: one that nohup or a script's `&` starts ignores them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}  # type: ignore[arg-type]
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
