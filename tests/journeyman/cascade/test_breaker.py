"""When a failing teacher is left alone, and how it is let back in."""

from hypothesis import given
from hypothesis import strategies as st

from journeyman.cascade.breaker import Breaker
from journeyman.recipe import Breaker as Settings

SETTINGS = Settings(failures=3, pause_s=2.0, max_pause_s=5.0, probe_timeout_s=10.0)


def opened(at: float) -> Breaker:
    breaker = Breaker(SETTINGS)
    for _ in range(3):
        assert breaker.admit(at)
        breaker.failed(at)
    return breaker


def test_it_opens_after_failures_in_a_row_only():
    breaker = Breaker(SETTINGS)
    for _ in range(5):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.is_closed and breaker.admit(0.0)
    breaker = opened(at=7.0)
    assert not breaker.is_closed and not breaker.admit(7.0)
    assert breaker.opens_in_s(7.5) == 1.5


def test_after_the_pause_one_request_goes_through_and_its_success_closes():
    breaker = opened(at=0.0)
    assert not breaker.admit(1.9)
    assert breaker.admit(2.0) and not breaker.admit(2.0) and not breaker.admit(3.0)
    breaker.succeeded()
    assert breaker.is_closed and breaker.admit(3.0) and breaker.admit(3.0)


def test_each_failed_probe_doubles_the_pause_up_to_a_bound():
    breaker, now, pauses = opened(at=0.0), 2.0, []
    for _ in range(3):
        assert breaker.admit(now)
        breaker.failed(now)
        pauses.append(breaker.opens_in_s(now))
        now += pauses[-1]
    assert pauses == [4.0, 5.0, 5.0]


def test_requests_that_were_under_way_when_it_opened_do_not_lengthen_the_pause():
    breaker = opened(at=0.0)
    for _ in range(50):
        breaker.failed(1.0)
    assert breaker.opens_in_s(1.0) == 1.0


def test_a_probe_that_tells_nothing_makes_room_for_another():
    breaker = opened(at=0.0)
    assert breaker.admit(2.0)
    breaker.abandoned()
    assert breaker.admit(2.1)
    assert not breaker.admit(12.0) and breaker.admit(12.1)  # nothing was heard of that one


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from("sfa")), max_size=60))
def test_it_never_stays_shut(steps: list[tuple[float, str]]):
    """Whatever happened, a request is let through once the longest pause and probe are over."""
    breaker, now = Breaker(SETTINGS), 0.0
    for wait, outcome in steps:
        now += wait
        if breaker.admit(now):
            match outcome:
                case "s":
                    breaker.succeeded()
                case "f":
                    breaker.failed(now)
                case "a":
                    breaker.abandoned()
    assert breaker.admit(now + SETTINGS.max_pause_s + SETTINGS.probe_timeout_s)


def test_however_many_requests_were_in_a_replica_when_it_failed_it_failed_once():
    breaker = Breaker(SETTINGS)
    for now in (5.0, 5.0, 5.1, 6.0):
        breaker.failed(now, "a", began=1.0)
    assert breaker.is_closed
    breaker.failed(7.0, "b", began=1.0)
    assert breaker.is_closed
    breaker.failed(7.1, "a", began=5.5)  # asked after it had failed: it failed again
    assert not breaker.is_closed


def test_one_that_was_under_way_is_not_taken_for_a_probe():
    breaker = Breaker(SETTINGS)
    for now in (1.0, 2.0, 3.0):
        breaker.failed(now, "a", began=now)
    assert breaker.admit(5.0)
    breaker.failed(5.5, "a", began=0.5)
    assert not breaker.admit(5.6)  # the probe is still out
    breaker.succeeded()
    assert breaker.is_closed
