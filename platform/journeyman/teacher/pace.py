"""How fast an API may be asked: so many requests, or tokens, a minute. Pure, but for the clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Spaces what is taken, so that a minute never holds more than ``per_minute`` of it.

    The first may go at once, and each later one when all before it are paid for: there are no
    bursts, which many APIs refuse within their limit of a minute. One thread's, or one loop's.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_minute / 60
        self._clock = clock
        self._paid_at = clock()  # when all that was taken up to now is paid for

    def reserve(self, amount: float) -> float:
        """Take ``amount``; returns the seconds to wait before using it."""
        now = self._clock()
        starts_at = max(now, self._paid_at)
        self._paid_at = starts_at + amount / self._per_second
        return starts_at - now

    def correct(self, difference: float) -> None:
        """What was used beyond a reservation; negative where it was less."""
        self._paid_at += difference / self._per_second
