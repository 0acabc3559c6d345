"""What all replicas of a cascade share of their teacher: whether it is left alone, and who tries.

Each replica decides by its own breaker and tells what came of it; here these words become one
state, and one replica at a time gets the lease to let a probe through. Pure: takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A breaker opened, or its probe failed; for_s: seconds to leave the teacher alone."""

    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The teacher answered a replica's probe."""


News = Opened | Closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """open_for_s: seconds that are left of the pause, 0 once it is over, None while closed;
    pause_s: the whole of it; may_probe: whether this replica holds the lease."""

    open_for_s: float | None
    pause_s: float
    may_probe: bool


class SharedBreaker:
    """One state from the news of all replicas."""

    def __init__(self, probe_timeout_s: float) -> None:
        """probe_timeout_s: after so long without news the lease goes to another replica."""
        self._probe_timeout_s = probe_timeout_s
        self._open_until: float | None = None
        self._pause_s = 0.0
        self._lease: tuple[str, float] | None = None  # whose, and since when

    def heard(self, news: News | None, now: float) -> None:
        if isinstance(news, Closed):
            self._open_until = self._lease = None
        elif news is not None:
            self._open_until, self._pause_s, self._lease = now + news.for_s, news.for_s, None

    def state(self, replica: str, now: float) -> Shared:
        """For one replica that asks."""
        if self._open_until is None:
            return Shared(open_for_s=None, pause_s=0.0, may_probe=False)
        if now >= self._open_until:
            lease = self._lease
            if lease is None or now - lease[1] > self._probe_timeout_s:
                self._lease = (replica, now)
        return Shared(
            open_for_s=max(0.0, self._open_until - now),
            pause_s=self._pause_s,
            may_probe=self._lease is not None and self._lease[0] == replica,
        )
