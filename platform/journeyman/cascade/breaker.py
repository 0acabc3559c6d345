"""Whether the teacher may be asked at all: after failures in a row it is left alone for a while.

Pure: takes the time, in seconds of any clock that only goes forward. Knows nothing of teachers.
"""

from __future__ import annotations

import math

from journeyman.cascade.sharing import Closed, News, Opened, Shared
from journeyman.recipe import Breaker as Settings


class Breaker:
    """A circuit breaker (Nygard, Release It!, 2007): closed, open, and half-open for one probe.

    Whoever was admitted says how it went: ``succeeded``, ``failed``, or ``abandoned`` where the
    caller went away before anything was known.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._failures = 0  # in a row
        self._failed_at: dict[str, float] = {}  # the last one that counted, by replica
        self._pause_s = settings.pause_s
        self._open_until: float | None = None
        self._probe_since: float | None = None
        self._may_probe = True  # until others have a say in it
        self.news: News | None = None  # what they have not heard yet

    @property
    def is_closed(self) -> bool:
        return self._open_until is None

    def opens_in_s(self, now: float) -> float:
        """Seconds until a request may be let through; 0 while closed."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def admit(self, now: float) -> bool:
        """Whether one request may go to the teacher now."""
        if self._open_until is None:
            return True
        probing = self._probe_since is not None and (
            now - self._probe_since < self._settings.probe_timeout_s
        )
        if now < self._open_until or probing or not self._may_probe:
            return False
        self._probe_since = now
        return True

    def succeeded(self) -> None:
        if self._open_until is not None:
            self.news = Closed()
        self._close()

    def failed(self, now: float, replica: str | None = None, began: float = math.inf) -> None:
        """replica: of the teacher, where known; began: when it was asked. However many requests
        were in a replica when it failed, they tell of one failure."""
        if replica is not None:
            if began < self._failed_at.get(replica, -math.inf):
                return
            self._failed_at[replica] = now
        self._failures += 1
        if self._probe_since is not None:  # each failed probe doubles the pause
            self._pause_s = min(2 * self._pause_s, self._settings.max_pause_s)
            self._probe_since = None
        elif self._open_until is not None or self._failures < self._settings.failures:
            return  # one of those that were under way when it opened
        self._open_until = now + self._pause_s
        self.news = Opened(for_s=self._pause_s)

    def abandoned(self) -> None:
        self._probe_since = None

    def follow(self, shared: Shared, now: float) -> None:
        """Take over what all replicas share, unless they have not heard the newest from here."""
        if self.news is not None:
            return
        if shared.open_for_s is None:
            if self._open_until is not None:
                self._close()
            self._may_probe = True
            return
        self._open_until = now + shared.open_for_s
        self._pause_s = max(self._settings.pause_s, shared.pause_s)
        self._may_probe = shared.may_probe

    def alone(self) -> None:
        """Nobody can be asked what others know."""
        self._may_probe = True

    def _close(self) -> None:
        self._failures = 0
        self._failed_at.clear()
        self._pause_s = self._settings.pause_s
        self._open_until = self._probe_since = None
