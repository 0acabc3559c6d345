"""How long a next request would wait for the teacher."""

import pytest

from journeyman.cascade.refusals import Overloaded
from journeyman.cascade.waiting import WaitingRoom


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_retry_after_is_what_waits_over_the_rate_at_which_it_is_answered():
    clock = Clock()
    room = WaitingRoom(40, clock)
    for _ in range(10):  # 2 texts a second
        with room.places(2):
            clock.now += 1.0
    with room.places(40), pytest.raises(Overloaded) as refused, room.places(1):
        pass
    assert refused.value.retry_after_s == pytest.approx(40 / (20 / 9))


def test_a_teacher_that_answers_nothing_is_given_half_a_minute():
    room = WaitingRoom(4, Clock())
    with room.places(4), pytest.raises(Overloaded, match="4 texts wait") as refused, room.places(1):
        pass
    assert refused.value.retry_after_s == 30.0


def test_a_request_that_failed_is_no_sign_of_speed():
    clock = Clock()
    room = WaitingRoom(4, clock)
    with pytest.raises(TimeoutError), room.places(4):
        raise TimeoutError
    assert room.n_waiting == 0 and room.wait_s() == 30.0
