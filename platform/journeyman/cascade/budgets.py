"""What API keys may cost: dollars a day at the teacher's price, over all replicas and restarts.

A replica spends from a lease and settles every second; what it has spent is written before it gets
the next one. Leases of all replicas together never reach what is left, so a key can cost more than
its budget only by the requests that were under way when it ran out, and by what a replica that was
killed had not settled. Pure: takes the date.
"""

from __future__ import annotations

import contextvars
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from journeyman.errors import DataError

# The key whose request is being answered, by its hash; None where nobody needs one.
paying: contextvars.ContextVar[str | None] = contextvars.ContextVar("paying", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """What a replica may spend until it settles again, in dollars by key; used_up: keys whose
    budget of this day is spent, by the ledger; day: ISO date in UTC."""

    leases: Mapping[str, float]
    used_up: frozenset[str] = frozenset()
    day: str = ""


class Ledger:
    """What each key has spent on one day, in dollars."""

    def __init__(self, day: str, spent: Mapping[str, float] | None = None) -> None:
        """day: ISO date in UTC, when budgets begin anew."""
        self.day = day
        self._spent = defaultdict(float, spent or {})

    @property
    def spent(self) -> dict[str, float]:
        """Dollars by key."""
        return dict(self._spent)

    def paid(self, spent: Mapping[str, float]) -> Ledger:
        """The ledger with this on top."""
        keys = {*self._spent, *spent}
        return Ledger(self.day, {key: self._spent[key] + spent.get(key, 0.0) for key in keys})

    def leases(
        self, limits: Mapping[str, float], others: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Dollars that a replica may spend until it settles again; others: leases that the other
        replicas hold. A share is left for one that nobody has heard of yet: a replica that starts,
        maybe in place of one that was lost with its lease."""
        return {
            key: max(0.0, limit - self._spent[key] - sum(held.get(key, 0.0) for held in others))
            / (len(others) + 2)
            for key, limit in limits.items()
        }

    def used_up(self, limits: Mapping[str, float]) -> frozenset[str]:
        """Keys that have spent their limit."""
        return frozenset(key for key, limit in limits.items() if self._spent[key] >= limit)

    def to_json(self) -> bytes:
        return json.dumps({"day": self.day, "spent": self.spent}, indent=1).encode()

    @classmethod
    def from_json(cls, written: bytes, where: str) -> Ledger:
        """Raises DataError."""
        try:
            content = json.loads(written)
            return cls(content["day"], {key: float(x) for key, x in content["spent"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where}: damaged ({type(error).__name__}), so nobody knows what the keys have "
                "spent today; delete it to begin the day anew."
            ) from error


class Purse:
    """One replica's part: what it may spend, and what it has not settled yet."""

    def __init__(self, limits: Mapping[str, float]) -> None:
        """limits: dollars a day, of the keys that have a budget."""
        self.limits = dict(limits)
        self._lent: Lent | None = None  # before the first settlement
        self._unsettled: defaultdict[str, float] = defaultdict(float)

    @property
    def leases(self) -> dict[str, float]:
        """Dollars by key; none before the first settlement."""
        return dict(self._lent.leases) if self._lent else {}

    def may_pay(self, key: str) -> bool:
        """Whether a request of this key may begin."""
        if key not in self.limits:
            return True
        return self.leases.get(key, 0.0) > self._unsettled[key]

    def is_used_up(self, key: str, day: str) -> bool:
        """Whether the key has spent its budget of that day; else it may pay again soon, once its
        lease is a new one."""
        return self._lent is not None and self._lent.day == day and key in self._lent.used_up

    def pay(self, key: str | None, dollars: float) -> None:
        if key is not None and key in self.limits:
            self._unsettled[key] += dollars

    def bill(self) -> dict[str, float]:
        """What is to be settled."""
        return {key: dollars for key, dollars in self._unsettled.items() if dollars > 0}

    def settled(self, bill: Mapping[str, float], lent: Lent) -> None:
        """The bill was written, and this is lent next."""
        for key, dollars in bill.items():
            self._unsettled[key] -= dollars
        self._lent = lent
