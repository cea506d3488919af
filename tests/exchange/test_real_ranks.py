"""A sample on real processes: what simulated ranks cannot show of `Comm`."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch.distributed as dist
from test_schedules import KINDS, SCHEDULES, summaries
from tolerances import relative_error
from world import run

from lasp.algebra import scan
from lasp.distributed.comm import Comm
from lasp.exchange import Auto, Payload
from lasp.exchange.cost import GLOO


@pytest.mark.parametrize("grouped", [False, True])
def test_all_schedules(grouped):
    """Every schedule and kind over gloo; `grouped` by the batched messages that NCCL needs."""
    problems = [
        (runs, initial, scan(runs, initial, reverse=reverse), reverse)
        for kind, reverse in itertools.product(KINDS, (False, True))
        for runs, initial in [(summaries(kind, 5, (2, 3, 4, 7)), summaries("identity", 1, (2, 3, 4, 7)).state[0])]
    ]

    def work(rank: int) -> list[float]:
        comm = Comm(dist.group.WORLD, 30.0)
        comm._through_host = not grouped
        errors = []
        for exchange, (runs, initial, (entering, total), reverse) in itertools.product(SCHEDULES.values(), problems):
            pending = exchange.begin(comm, runs[rank], initial, reverse=reverse, want_total=True)
            carried = pending.wait()
            errors += [relative_error(carried.entering, entering[rank]), relative_error(carried.total, total)]
        return errors

    for errors in run(5, work):
        assert len(errors) == 2 * len(SCHEDULES) * len(problems) and max(errors) < 1e-13


def test_ranks_of_one_host():
    def work(rank: int) -> tuple:
        comm = Comm(dist.group.WORLD, 30.0)
        pair: Any = dist.new_group([0, 2]) if rank != 1 else dist.new_group([0, 2]) and None
        return comm.nodes, None if rank == 1 else Comm(pair, 30.0).nodes

    assert run(3, work) == [((3,), (2,)), ((3,), None), ((3,), (2,))]


def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="lasp.exchange"):
        Auto(GLOO).choose(Payload(7, 11, 13, 1), (3,))
    assert "chosen: " in caplog.text and "3 ranks on one host" in caplog.text
