"""Ranks that disagree, or do not come, get one clear error each, in time: never a hang, never a wrong number."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from world import run

import lasp
from lasp.exchange import EXCHANGES


def call(rank: int, **changed) -> tuple[str, str]:
    """One call with this rank's arguments; the kind and text of its error."""
    sp_options = changed.pop("sp", {})
    tensors = {name: torch.zeros(2, 8, 2, 4) for name in "qkv"}
    tensors.update({name: changed.pop(name) for name in "qkvg" if name in changed})
    sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=20, **sp_options)
    try:
        lasp.linear_attention(tensors["q"], tensors["k"], tensors["v"], tensors.get("g"), sp=sp, **changed)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


DIFFERENT = {
    "dtype": (
        lambda: {name: torch.zeros(2, 8, 2, 4).double() for name in "qkv"},
        "dtype: rank 0 has torch.float32, rank 1 has torch.float64",
    ),
    "half": (
        lambda: {name: torch.zeros(2, 8, 2, 4).half() for name in "qkv"},
        "dtype: rank 0 has torch.float32, rank 1 has torch.float16",
    ),
    "batch": (lambda: {name: torch.zeros(1, 8, 2, 4) for name in "qkv"}, "batch: rank 0 has 2, rank 1 has 1"),
    "tokens": (
        lambda: {name: torch.zeros(2, 7, 2, 4) for name in "qkv"},
        "pass lengths= .*: rank 0 has 8, rank 1 has 7",
    ),
    "head_dim": (lambda: {"v": torch.zeros(2, 8, 2, 5)}, "K and V: "),
    "gate": (lambda: {"g": torch.zeros(2)}, "gate dims: rank 0 has None, rank 1 has 1"),
    "exchange": (lambda: {"sp": {"exchange": "ring"}}, "exchange: rank 0 has auto, rank 1 has ring"),
    "lengths": (lambda: {"sp": {"lengths": (8, 8)}}, "lengths: rank 0 has None, rank 1 has"),
    "gradients": (
        lambda: {"q": torch.zeros(2, 8, 2, 4, requires_grad=True)},
        "gradients: rank 0 has False, rank 1 has True",
    ),
    "positive gate": (lambda: {"g": torch.full((2,), 0.5)}, "rank 1: g is the natural logarithm"),
    "bad shape": (lambda: {"k": torch.zeros(2, 9, 2, 4)}, "rank 1: k must have q's shape"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ(case):
    changed, message = DIFFERENT[case]
    first, second = run(2, lambda rank: call(rank, **(changed() if rank == 1 else {})))
    assert first[0] == second[0] == "ExchangeError"
    assert first[1] == second[1], "the same error everywhere"
    assert re.search(message, first[1]), first[1]


def test_ranks_that_agree():
    """The control."""
    assert run(2, call) == [("", ""), ("", "")]


def test_a_rank_that_does_not_come():
    """Past the deadline the others raise; the message names who waited, for what, and where to look."""

    def work(rank: int) -> tuple[float, str]:
        sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=2)
        q = torch.zeros(1, 4, 1, 2)
        lasp.linear_attention(q, q, q, sp=sp)
        start = time.monotonic()
        if rank == 0:
            # Until the other has given up: its answer is the event that ends this rank's absence.
            store = dist.distributed_c10d._get_default_store()
            store.get("gave up")
            return 0.0, ""
        try:
            lasp.linear_attention(q, q, q, sp=sp)
        except lasp.ExchangeError as error:
            dist.distributed_c10d._get_default_store().set("gave up", "1")
            return time.monotonic() - start, str(error)
        return 0.0, "no error"

    _, (seconds, message) = run(2, work)
    assert "rank 1 of 2" in message and "deadline 2 s" in message, message
    assert seconds < 10


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_rank_that_dies(exchange):
    def work(rank: int) -> str:
        sp = lasp.SequenceParallel(dist.group.WORLD, timeout_s=20, exchange=exchange)
        q = torch.zeros(1, 4, 1, 2)
        try:
            lasp.linear_attention(q, q, q, sp=sp)
            if rank == 0:
                os._exit(9)
            lasp.linear_attention(q, q, q, sp=sp)
        except lasp.ExchangeError as error:
            return str(error)
        return "no error"

    with pytest.raises(AssertionError) as caught:
        run(2, work)
    # Only the dead rank failed: the survivor returned its error in time.
    assert "rank 0: the process died" in str(caught.value) and "rank 1" not in str(caught.value)


def test_wrong_arguments():
    def work(rank: int) -> list[str]:
        messages = []
        for arguments in (
            {"lengths": (1, 2, 3)},
            {"lengths": (-1, 2)},
            {"exchange": "rings"},
        ):
            try:
                lasp.SequenceParallel(dist.group.WORLD, **arguments)
            except ValueError as error:
                messages.append(str(error))
        mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp"))
        for group in (mesh, None, "world"):
            try:
                lasp.SequenceParallel(group)  # type: ignore[arg-type]
            except ValueError as error:
                messages.append(str(error))
        try:
            lasp.SequenceParallel(mesh["sp"]).shard(torch.zeros(1, 5))
        except ValueError as error:
            messages.append(str(error))
        return messages

    messages = run(2, work)
    assert messages[0] == messages[1] and len(messages[0]) == 7
    for text, message in zip(
        ("one number of tokens", ">= 0", "'rings'", "one-dimensional", "NoneType", "str", "lengths="),
        messages[0],
        strict=True,
    ):
        assert text in message, message
