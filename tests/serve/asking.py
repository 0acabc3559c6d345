"""Clients that ask all the while, and what became of their requests."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Asked:
    """outcomes: requests by what became of them, a status, ``silence`` or ``connection``;
    answered_by: those with status 200; errors: words of the others."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answered_by: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def n_lost(self) -> int:
        return self.outcomes.total() - self.outcomes["200"]

    def became(self, outcome: str, seconds: float, answered_by: str = "", words: str = "") -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            self.slowest_s = max(self.slowest_s, seconds)
            if outcome == "200":
                self.answered_by[answered_by] += 1
            else:
                self.errors.append(f"{outcome} after {seconds:.1f} s: {words[:300]}")


@contextmanager
def asking(url: str, texts: list[str], n_clients: int, silence_s: float = 60) -> Iterator[Asked]:
    """Each client asks again once it has an answer, or none within silence_s."""
    asked = Asked()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=silence_s) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    response = client.post("/v1/classify", json={"input": texts})
                    outcome, words = str(response.status_code), response.text
                    by = response.headers.get("x-journeyman-answered-by", "")
                except httpx.HTTPError as error:
                    silent = isinstance(error, httpx.TimeoutException)
                    outcome, words, by = "silence" if silent else "connection", repr(error), ""
                asked.became(outcome, time.monotonic() - began, by, words)

    clients = [threading.Thread(target=ask) for _ in range(n_clients)]
    for each in clients:
        each.start()
    try:
        yield asked
    finally:
        stop.set()
        for each in clients:
            each.join()
