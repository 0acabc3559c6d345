"""What API keys may cost: dollars a day at the teacher's price, over all replicas and restarts.

A replica spends from a lease and settles every second; what it has spent is written before it gets
the next one. Leases of all replicas together never exceed what is left, so a key can cost more than
its budget only by the requests that were under way when it ran out. Pure: takes the date.
"""

from __future__ import annotations

import contextvars
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from journeyman.errors import DataError

# The key whose request is being answered, by its hash; None where nobody needs one.
paying: contextvars.ContextVar[str | None] = contextvars.ContextVar("paying", default=None)


class Ledger:
    """What each key has spent on one day, in dollars."""

    def __init__(self, day: str, spent: Mapping[str, float] | None = None) -> None:
        """day: ISO date in UTC, when budgets begin anew."""
        self.day = day
        self._spent = defaultdict(float, spent or {})

    def paid(self, spent: Mapping[str, float]) -> Ledger:
        """The ledger with this on top."""
        keys = {*self._spent, *spent}
        return Ledger(self.day, {key: self._spent[key] + spent.get(key, 0.0) for key in keys})

    def leases(
        self, limits: Mapping[str, float], others: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """Dollars that a replica may spend until it settles again; others: leases that the other
        replicas hold."""
        return {
            key: max(0.0, limit - self._spent[key] - sum(held.get(key, 0.0) for held in others))
            / (len(others) + 1)
            for key, limit in limits.items()
        }

    def to_json(self) -> bytes:
        return json.dumps({"day": self.day, "spent": dict(self._spent)}, indent=1).encode()

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
        self._leases: dict[str, float] | None = None  # before the first settlement
        self._unsettled: defaultdict[str, float] = defaultdict(float)

    @property
    def leases(self) -> dict[str, float]:
        """Dollars by key; none before the first settlement."""
        return dict(self._leases or {})

    @property
    def has_settled(self) -> bool:
        return self._leases is not None

    def may_pay(self, key: str) -> bool:
        """Whether a request of this key may begin."""
        if key not in self.limits:
            return True
        return self._leases is not None and self._leases[key] > self._unsettled[key]

    def pay(self, key: str | None, dollars: float) -> None:
        if key is not None and key in self.limits:
            self._unsettled[key] += dollars

    def bill(self) -> dict[str, float]:
        """What is to be settled."""
        return {key: dollars for key, dollars in self._unsettled.items() if dollars > 0}

    def settled(self, bill: Mapping[str, float], leases: dict[str, float]) -> None:
        """The bill was written, and these are the next leases."""
        for key, dollars in bill.items():
            self._unsettled[key] -= dollars
        self._leases = leases
