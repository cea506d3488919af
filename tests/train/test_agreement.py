"""Processes of a run that were started differently, or whose copies of the weights differ, all say so and end."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import world
from torch.distributed.tensor import DTensor
from training_runs import small_config

from lasp.errors import ConfigError, PeerLostError, ReplicaError
from lasp.train.checkpoint.replicas import digest
from lasp.train.config import TrainConfig
from lasp.train.handshake import compare, description
from lasp.train.step import Stepper
from lasp.train.trainer import train


def test_processes_started_with_other_options_end_with_one_message(tmp_path: Path) -> None:
    """Each for itself, as a launcher starts them: every process ends with code 64 before anything is written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "lasp.cli.main", "train", "--run-dir", str(tmp_path / "run")]
    others = ["--optimizer.lr", "1e-3", "--seed", "3", "--optimizer.clip-norm", "2", "--data-parallel", "zero3"]
    processes = [
        forked.Popen(
            [*command, *options],
            env={**os.environ, **meeting, "RANK": str(rank)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, options in enumerate(([], others))
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [64, 64], errors
    assert errors[0] == errors[1]
    for line in ("optimizer.lr: 0.004 on rank 0, 0.001 on rank 1", "optimizer.clip_norm: 1.0 on rank 0, 2.0 on"):
        assert line in errors[0]
    assert errors[0].count(" on rank 1") == 4
    assert not (tmp_path / "run").exists()


def compared(folder: Path, records: list[dict | None]) -> list[str]:  # type: ignore[type-arg]
    """Returns what each process is told; None: one that does not come."""

    def tell(rank: int) -> str:
        own = records[rank]
        if own is None:
            return ""
        store = dist.FileStore(str(folder / "meet"), len(records))
        try:
            compare(own, rank=rank, size=len(records), store=store, timeout_s=3 if None in records else 60)
        except (ConfigError, PeerLostError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return world.run(len(records), tell)


def test_what_is_compared(tmp_path: Path) -> None:
    """Every option but the few that a process may have for itself; a layout that one of them cannot have; a process
    that does not come."""
    base = description(TrainConfig(), None, "cpu")
    leaves = sum(len(dataclasses.asdict(value)) for value in vars(TrainConfig()).values() if hasattr(value, "__dict__"))
    plain = sum(not hasattr(value, "__dict__") for value in vars(TrainConfig()).values())
    assert len(base.keys() & {"resume", "kind of device", "python", "torch", "numpy"}) == 5
    assert sum("." in name or name in vars(TrainConfig()) for name in base) >= leaves + plain - 3
    cases = {
        "same": ([base, dict(base), dict(base)], ["", "", ""]),
        "other": ([base, {**base, "torch": "0.1"}, base], [r'torch: ".*" on ranks 0, 2, "0.1" on rank 1'] * 3),
        "cannot": ([base, {"error": "--sp 3 is odd"}, base], ["ConfigError: .*\n  rank 1: --sp 3 is odd$"] * 3),
        "absent": ([base, None, base], ["PeerLostError: rank 0 of 3", "^$", "PeerLostError: rank 2 of 3"]),
    }
    for name, (records, expected) in cases.items():
        (tmp_path / name).mkdir()
        told = compared(tmp_path / name, records)
        for text, pattern in zip(told, expected, strict=True):
            assert text == "" if pattern == "" else re.search(pattern, text), (name, told)


REPLICATED = {"ddp": (2, {"sp": 2}), "zero1": (3, {"sp": 1}), "zero2": (4, {"sp": 2, "dp_replicate": 2})}


@pytest.mark.parametrize("kind", REPLICATED)
def test_copies_that_differ_by_a_bit_are_not_saved(kind: str, tmp_path: Path) -> None:
    """One bit of one weight on the last process, flipped after a step; the checkpoint before, undisturbed, is there."""
    processes, layout = REPLICATED[kind]
    config = small_config(tmp_path, steps=4, save_every=2, global_batch=12)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data_parallel=kind, **layout))
    step = Stepper.step

    def disturbed(self: Stepper, number: int, **options):  # type: ignore[no-untyped-def]
        result = step(self, number, **options)
        if number == 3 and dist.get_rank() == processes - 1:
            weight = dict(self.model.module.named_parameters())["blocks.1.attention.out_proj.weight"].detach()
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            local.view(torch.int32).view(-1)[3] ^= 1
        return result

    def run(_rank: int) -> str:
        Stepper.step = disturbed  # type: ignore[method-assign]  # of this process
        try:
            train(config)
        except ReplicaError as error:
            return f"{error.exit_code}: {error}"
        return ""

    told = world.run(processes, run)
    assert len(set(told)) == 1 and told[0].startswith("72: after step 4"), told
    holders = {"ddp": "ranks 0 and 1", "zero1": "rank 2 (2 other", "zero2": "ranks 1 and 3"}[kind]
    assert f"weight of blocks.1.attention.out_proj.weight on {holders}" in told[0], told[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_digest_sees_every_bit(dtype: torch.dtype) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = torch.randn(3, 5).to(dtype)
    before = int(digest(tensor))
    for place in range(15):
        for bit in range(8 * dtype.itemsize):
            value = -(1 << bit) if bit == 8 * dtype.itemsize - 1 else 1 << bit
            other = tensor.clone()
            other.view(integers).view(-1)[place] ^= value
            assert int(digest(other)) != before
    assert int(digest(tensor.clone())) == before
