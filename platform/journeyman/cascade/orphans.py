"""Who is asked to take up the audits of members that are gone. Pure: takes the time.

One that lives is asked at a time, since whoever can read what is left asks the teacher for it. Were
two at it, as where one was slow, outcomes would still count once, by their numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

ASKED_FOR_S = 5.0  # before it is the next one's turn
GIVEN_UP_AFTER_S = 600.0  # a replica that starts again on the same host has loaded its models


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A member that is gone. last: the number of its last audit that counted; n_owed: audits behind
    that one, by what it said last."""

    member: str
    last: int
    n_owed: int


class Orphans:
    """Those of one bundle."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._until: dict[str, float] = {}  # somebody's turn
        self._asked: dict[str, dict[str, float]] = {}  # when, by whom
        self._looked_at = 0.0
        self.new: list[str] = []  # by the last look

    def given_up(self, gone: Collection[str], now: float) -> list[str]:
        """Of those that are gone. Time in which nobody of the bundle lived is none in which
        somebody could have taken them up, so after it they have all of theirs again."""
        if now - self._looked_at > GIVEN_UP_AFTER_S / 10:
            self._since.clear()
        self._looked_at = now
        for of_each in (self._since, self._until, self._asked):
            for name in of_each.keys() - set(gone):
                del of_each[name]
        self.new = [name for name in gone if name not in self._since]
        self._since.update(dict.fromkeys(self.new, now))
        return [name for name in gone if now - self._since[name] >= GIVEN_UP_AFTER_S]

    def offered(
        self, gone: Collection[str], to: str, living: Collection[str], now: float
    ) -> str | None:
        """One of those that are gone that it is this member's turn to take up: the one that it was
        not asked for the longest, the first of several."""
        due: list[tuple[float, str]] = []
        for name in gone:
            asked = self._asked.setdefault(name, {})
            first = min((asked.get(one, -1.0) for one in living), default=-1.0)
            if now >= self._until.get(name, 0.0) and asked.get(to, -1.0) <= first:
                due.append((asked.get(to, -1.0), name))
        if not due:
            return None
        _, name = min(due, key=lambda one: one[0])
        self._asked[name][to], self._until[name] = now, now + ASKED_FOR_S
        return name
