"""The pace of requests, by a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.teacher.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_goes_at_once_and_each_later_one_when_those_before_are_paid_for():
    clock = Clock()
    pace = Pace(per_minute=60, clock=clock)
    assert [pace.reserve(1), pace.reserve(5), pace.reserve(1)] == [0, 1, 6]
    clock.now += 100  # an idle time is not saved up
    assert [pace.reserve(1), pace.reserve(1)] == [0, 1]


def test_a_reservation_is_corrected_by_what_was_used():
    clock = Clock()
    pace = Pace(per_minute=600, clock=clock)
    pace.reserve(100)
    pace.correct(-80)  # only 20 were used
    assert pace.reserve(10) == pytest.approx(2)
    pace.correct(+30)
    assert pace.reserve(0) == pytest.approx(6)


@given(
    per_minute=st.integers(1, 10_000),
    taken=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), min_size=1, max_size=50),
)
def test_no_minute_holds_more_than_the_limit_but_for_the_one_that_ends_it(per_minute, taken):
    clock = Clock()
    pace = Pace(per_minute, clock)
    uses = []
    for idle_s, amount in taken:
        clock.now += idle_s
        uses.append((clock.now + pace.reserve(amount), amount))
    for start, _ in uses:
        within = [amount for at, amount in uses if start <= at < start + 60]
        assert sum(within[:-1]) <= per_minute * (1 + 1e-6)


def test_workers_that_reserve_too_much_still_get_the_whole_rate():
    """Eight workers reserve 300 tokens a request and use 20, at 6,000 tokens a minute."""
    clock = Clock()
    pace = Pace(6000, clock)
    ready = [(clock.now, worker) for worker in range(8)]
    used = 0
    while clock.now < 1000 + 600:
        at, worker = min(ready)
        ready.remove((at, worker))
        clock.now = max(clock.now, at)
        if used:  # this worker's last answer has come
            pace.correct(20 - 300)
        used += 20
        ready.append((clock.now + pace.reserve(300) + 0.5, worker))
    assert used / 600 == pytest.approx(100, rel=0.05)  # tokens a second
