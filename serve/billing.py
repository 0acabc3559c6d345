"""What API keys with a budget have spent, settled by all replicas of a cascade in one ledger a day.

The deployment's part keeps the ledger and hands out leases; a replica's part settles its purse.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.budgets import Ledger, Purse
from journeyman.errors import JourneymanError
from journeyman.folder import Folder

# Of every replica's calls to the deployment Agreement.
EVERY_S = 1.0
TIMEOUT_S = 10.0
GONE_AFTER_S = 60.0  # without a word of it, a replica is dead, and what it had pending is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one replica's keys have spent since it settled last; number: of this bill, so that one
    that is sent again counts once; holds: its leases, of which it spent that; state: the folder or
    store where the ledgers are."""

    replica: str
    number: int
    spent: Mapping[str, float]
    holds: Mapping[str, float]
    limits: Mapping[str, float]
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """A replica's last bill: its number, when it came, and what it may spend since."""

    number: int
    at: float
    leases: dict[str, float]


class Billing:
    """The one ledger, and the leases on it."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._settled: dict[str, _Settled] = {}  # by replica
        self._writing = asyncio.Lock()

    async def settle(self, bill: Bill) -> dict[str, float]:
        """Keep what was spent; the replica's leases. Raises ClusterError, DataError."""
        now, folder = time.monotonic(), Folder(bill.state)
        async with self._writing:
            ledger = await self._todays(folder)
            before = self._settled.get(bill.replica)
            if bill.spent and (before is None or bill.number > before.number):
                ledger = ledger.paid(bill.spent)
                await asyncio.to_thread(folder.put, _ledger_name(ledger.day), ledger.to_json())
                self._ledger = ledger
            others = [
                one.leases
                for replica, one in self._settled.items()
                if replica != bill.replica and now - one.at < GONE_AFTER_S
            ]
            leases = ledger.leases(bill.limits, others)
            if before is None and bill.holds:
                # We began anew beneath it. Others hold leases, too, of which we have not heard yet:
                # it keeps its own until the next time.
                leases = {key: max(0.0, bill.holds[key] - bill.spent.get(key, 0.0))
                          for key in leases}  # fmt: skip
            self._settled[bill.replica] = _Settled(number=bill.number, at=now, leases=leases)
            return leases

    async def _todays(self, folder: Folder) -> Ledger:
        today = datetime.now(UTC).date().isoformat()
        if self._ledger is None or self._ledger.day != today:
            name = _ledger_name(today)
            try:
                written = await asyncio.to_thread(folder.get, name)
                self._ledger = Ledger.from_json(written, folder.path(name))
            except FileNotFoundError:
                self._ledger = Ledger(today)
        return self._ledger


async def settle(
    purse: Purse, replica: str, state: str, ask: Callable[[Bill], Awaitable[dict[str, float]]]
) -> None:
    """Settle a replica's purse, as long as it lives. Where nobody answers, its leases run out."""
    number, bill = 0, None
    while True:
        if bill is None:  # one and the same until it is heard
            number += 1
            bill = Bill(
                replica=replica,
                number=number,
                spent=purse.bill(),
                holds=purse.leases,
                limits=purse.limits,
                state=state,
            )
        with contextlib.suppress(RayError, RayServeException, TimeoutError, JourneymanError):
            async with asyncio.timeout(TIMEOUT_S):
                leases = await ask(bill)
            purse.settled(bill.spent, leases)
            bill = None
        await asyncio.sleep(EVERY_S)


def _ledger_name(day: str) -> str:
    return f"budgets/{day}.json"
