"""Time waiting and time hidden, by a clock whose ticks are given."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lasp.distributed.clock import ExchangeClock


class Ticks:
    """Marks at the times listed, one after another."""

    def __init__(self, *times: float) -> None:
        self._times = iter(times)

    def now(self) -> float:
        return next(self._times)

    def seconds(self, start: float, end: float) -> float:
        return end - start


def clock(*times: float) -> ExchangeClock:
    made = ExchangeClock(on_device=False)
    made._marks = Ticks(*times)  # type: ignore[assignment]
    return made


def test_work_between_begin_and_wait_is_hidden() -> None:
    one = clock(10, 13, 17)
    one.begun()
    one.wait_begins()
    one.wait_ends(1)
    assert one.read() == (4, 3)


def test_several_messages_at_once_count_once() -> None:
    two = clock(0, 2, 3, 7, 8)
    two.begun()
    two.begun()  # the first is still under way: no mark
    two.wait_begins()
    two.wait_ends(1)
    two.wait_begins()
    two.wait_ends(1)
    assert two.read() == ((3 - 2) + (8 - 7), 2 + (7 - 3))


def test_with_nothing_under_way_work_is_not_hidden() -> None:
    alone = clock(5, 6, 100, 101)
    for _ in range(2):  # two broadcasts, far apart
        alone.wait_begins()
        alone.wait_ends(0)
    assert alone.read() == (2, 0)


def test_host_marks_go_forward() -> None:
    marks = ExchangeClock(on_device=False)._marks
    times = [marks.now() for _ in range(3)]
    assert all(marks.seconds(early, late) >= 0 for early, late in pairwise(times))
    assert marks.seconds(0.5, 2.0) == pytest.approx(1.5)
