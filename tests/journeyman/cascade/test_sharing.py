"""Replicas that share a breaker: what one learns all know, and one at a time tries the teacher."""

from hypothesis import given
from hypothesis import strategies as st

from journeyman.cascade.breaker import Breaker
from journeyman.cascade.sharing import Closed, Opened, SharedBreaker
from journeyman.recipe import Breaker as Settings

SETTINGS = Settings(failures=3, pause_s=2.0, max_pause_s=8.0, probe_timeout_s=10.0)


class Replicas:
    """Breakers that exchange with one state, as ``serve.agreement`` does it."""

    def __init__(self, n: int) -> None:
        self.shared = SharedBreaker(SETTINGS.probe_timeout_s)
        self.each = [Breaker(SETTINGS) for _ in range(n)]

    def exchange(self, i: int, now: float) -> None:
        breaker = self.each[i]
        self.shared.heard(breaker.news, now)
        breaker.news = None
        breaker.follow(self.shared.state(str(i), now), now)

    def exchange_all(self, now: float) -> None:
        for i in range(len(self.each)):
            self.exchange(i, now)

    def admitted(self, now: float) -> list[int]:
        return [i for i, breaker in enumerate(self.each) if breaker.admit(now)]


def opened_by_one(n: int = 3) -> Replicas:
    replicas = Replicas(n)
    for _ in range(3):
        replicas.each[1].failed(0.0)
    replicas.exchange_all(0.5)
    replicas.exchange_all(0.5)  # those that were asked before the news came
    return replicas


def test_one_replicas_failures_close_the_way_for_all():
    replicas = opened_by_one()
    assert replicas.admitted(1.0) == []
    assert all(not breaker.is_closed for breaker in replicas.each)


def test_after_the_pause_one_replica_tries_and_its_success_opens_the_way_for_all():
    replicas = opened_by_one()
    replicas.exchange_all(3.0)
    tried = replicas.admitted(3.0)
    assert len(tried) == 1 and replicas.admitted(3.1) == []
    replicas.each[tried[0]].succeeded()
    replicas.exchange(tried[0], 4.0)
    replicas.exchange_all(4.0)
    assert replicas.admitted(4.0) == [0, 1, 2]


def test_a_failed_probe_doubles_the_pause_of_all():
    replicas = opened_by_one()
    replicas.exchange_all(3.0)
    (tried,) = replicas.admitted(3.0)
    replicas.each[tried].failed(3.0)
    replicas.exchange(tried, 3.0)
    replicas.exchange_all(3.0)
    assert replicas.admitted(6.9) == []
    replicas.exchange_all(7.0)
    assert len(replicas.admitted(7.0)) == 1


def test_the_lease_of_a_replica_that_died_goes_to_another():
    replicas = opened_by_one()
    replicas.exchange(2, 3.0)  # takes the lease, and is heard of no more
    replicas.exchange(0, 4.0)
    assert not replicas.each[0].admit(4.0)
    replicas.exchange(0, 13.1)
    assert replicas.each[0].admit(13.1)


def test_alone_a_replica_tries_by_itself():
    replicas = opened_by_one()
    breaker = replicas.each[0]
    assert not breaker.admit(3.0)
    breaker.alone()
    assert breaker.admit(3.0)


def test_what_is_newer_here_than_there_is_not_overruled():
    breaker, shared = Breaker(SETTINGS), SharedBreaker(10.0)
    closed = shared.state("a", 0.0)
    for _ in range(3):
        breaker.failed(0.0)
    breaker.follow(closed, 0.1)  # asked before it opened, answered after
    assert not breaker.is_closed and isinstance(breaker.news, Opened)
    breaker.succeeded()
    assert isinstance(breaker.news, Closed)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_never_do_two_replicas_try_at_once(events: list[tuple[int, bool]]):
    """But for one that nothing was heard of for so long that it counts as lost."""
    replicas, now = opened_by_one(4), 1.0
    trying: dict[int, float] = {}  # since when
    for i, succeeds in events:
        now += 0.7
        replicas.exchange(i, now)
        breaker = replicas.each[i]
        if i in trying:
            del trying[i]
            breaker.succeeded() if succeeds else breaker.failed(now)
            replicas.exchange_all(now)
            replicas.exchange_all(now)
        elif not breaker.is_closed and breaker.admit(now):
            trying[i] = now
        heard_of = [at for at in trying.values() if now - at <= SETTINGS.probe_timeout_s]
        assert len(heard_of) <= 1
