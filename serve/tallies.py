"""What the replicas of a cascade have counted of a bundle, together.

Whichever replica is asked for figures adds to its own, which are of this moment, those of the
others, as the deployment ``Agreement`` heard them last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from serve.billing import GONE_AFTER_S

_NOW_S = 10.0  # without a word of it, what a replica has in work is nothing to go by


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Of one bundle, by replicas that run.

    totals, last_minute: texts by who answered, and requests refused; by_stage: texts by which of
    several students answered; dollars: ``teacher``, ``audit`` and ``saved``; audits: those that
    wait (``pending``), or have no outcome, by why; waiting: texts for the ``teacher`` and for the
    ``student``.
    """

    totals: Counter[str] = field(default_factory=Counter)
    last_minute: Counter[str] = field(default_factory=Counter)
    by_stage: Counter[str] = field(default_factory=Counter)
    dollars: dict[str, float] = field(default_factory=dict)
    audits: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)

    @property
    def escalation_rate(self) -> float | None:
        """Share of the last minute's texts that the student was asked about, None of none."""
        escalated = self.last_minute["teacher"] + self.last_minute["void"]
        answered = self.last_minute["student"] + escalated
        return escalated / answered if answered else None


def together(tallies: Iterable[Tally]) -> Tally:
    """Their sum."""
    sums: dict[str, Counter[str]] = {one.name: Counter() for one in fields(Tally)}
    for tally in tallies:
        for name, total in sums.items():
            total.update(getattr(tally, name))  # unlike +, also what is below zero
    return Tally(**sums)  # type: ignore[arg-type]


class Tallies:
    """Those that were heard last, by bundle and by member."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, tuple[float, Tally]]] = {}

    def others(self, bundle: str, member: str, tally: Tally | None, now: float) -> Tally:
        """Of all but the member, who reports; tally: its own, None where it leaves, or goes on for
        one that is gone."""
        heard = self._heard.setdefault(bundle, {})
        heard.pop(member, None)
        for name in [name for name, (at, _) in heard.items() if now - at > GONE_AFTER_S]:
            del heard[name]
        found = together(
            one if now - at <= _NOW_S else replace(one, last_minute=Counter(), waiting=Counter())
            for at, one in heard.values()
        )
        if tally is not None:
            heard[member] = now, tally
        if not heard:
            del self._heard[bundle]
        return found
