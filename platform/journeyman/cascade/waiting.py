"""What waits for a model: how much of it may, and how long a next request would wait."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from journeyman.cascade.refusals import Overloaded

_WINDOW_S = 30.0  # over which the teacher's rate is taken
_LONGEST_S = 60.0


class WaitingRoom:
    """Counts the texts that wait for a model, and turns away those that are too many."""

    def __init__(
        self,
        places: int,
        clock: Callable[[], float],
        whom: str = "teacher",
        refusal: type[Overloaded] = Overloaded,
    ) -> None:
        self._places = places
        self._whom, self._refusal = whom, refusal
        self._clock = clock
        self._left: deque[tuple[float, int]] = deque()  # when, and how many texts at once
        self.n_waiting = 0

    @contextlib.contextmanager
    def places(self, n: int) -> Iterator[None]:
        """Hold n places; raises Overloaded. Where nobody waits, a request of any size may."""
        if self.n_waiting and self.n_waiting + n > self._places:
            raise self._refusal(
                f"{self.n_waiting} texts wait for the {self._whom} and at most {self._places} may; "
                "send this request again a little later.",
                self.wait_s(),
            )
        self.n_waiting += n
        try:
            yield
            self._left.append((self._clock(), n))
            self._forget()
        finally:
            self.n_waiting -= n

    def _forget(self) -> None:
        since = self._clock() - _WINDOW_S
        while self._left and self._left[0][0] < since:
            self._left.popleft()

    def wait_s(self) -> float:
        """Seconds until what waits now is answered, at the rate of the last half minute; that much
        where nothing was answered in it."""
        now = self._clock()
        self._forget()
        n_answered = sum(n for _, n in self._left)
        if not n_answered:
            return _WINDOW_S
        seconds = max(now - self._left[0][0], 1.0)
        return min(_LONGEST_S, max(1.0, self.n_waiting * seconds / n_answered))
