"""What API keys with a budget have spent, settled by all replicas of a cascade in one ledger a day.

The deployment's part keeps the ledger and hands out leases; a replica's part settles its purse.
What one that stops can tell nobody, as with all of Serve, it leaves beside the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.budgets import Ledger, Lent, Purse
from journeyman.errors import ClusterError, JourneymanError
from journeyman.folder import Folder

# Of every replica's calls to the deployment Agreement.
EVERY_S = 1.0
TIMEOUT_S = 10.0
LEAVES_WITHIN_S = 3.0  # with each of its last words, of a replica that Serve gives ten seconds
GONE_AFTER_S = 60.0  # without a word of it, a replica is dead, and what it had pending is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one replica's keys have spent since it settled last; number: of this bill, so that one
    that is sent again counts once; holds: its leases, of which it spent that; state: the folder or
    store where the ledgers are; leaves: it is the last one, and its leases are free."""

    replica: str
    number: int
    spent: Mapping[str, float]
    holds: Mapping[str, float]
    limits: Mapping[str, float]
    state: str
    leaves: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """A replica's last bill: its number, when it came, and what it may spend since."""

    number: int
    at: float
    lent: Lent


class Billing:
    """The one ledger, and the leases on it."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._settled: dict[str, _Settled] = {}  # by replica
        self._writing = asyncio.Lock()

    async def settle(self, bill: Bill) -> Lent:
        """Keep what was spent; what is lent to the replica. Raises ClusterError, DataError."""
        now, folder = time.monotonic(), Folder(bill.state)
        async with self._writing:
            ledger = await self._todays(folder)
            before = self._settled.get(bill.replica)
            if before and bill.number < before.number:  # overtaken, and nobody waits for it
                return before.lent
            if bill.spent and (before is None or bill.number > before.number):
                ledger = ledger.paid(bill.spent)
                await asyncio.to_thread(folder.put, _ledger_name(ledger.day), ledger.to_json())
                self._ledger = ledger
            lent = Lent(
                leases={} if bill.leaves else self._leases(ledger, bill, now),
                used_up=ledger.used_up(bill.limits),
                day=ledger.day,
            )
            self._settled[bill.replica] = _Settled(number=bill.number, at=now, lent=lent)
            return lent

    def _leases(self, ledger: Ledger, bill: Bill, now: float) -> dict[str, float]:
        if bill.replica not in self._settled and bill.holds:
            # We began anew beneath it. Others hold leases, too, of which we have not heard yet: it
            # keeps its own until the next time.
            return {
                key: max(0.0, bill.holds[key] - bill.spent.get(key, 0.0)) for key in bill.limits
            }
        others = [
            one.lent.leases
            for replica, one in self._settled.items()
            if replica != bill.replica and one.lent.leases and now - one.at < GONE_AFTER_S
        ]
        return ledger.leases(bill.limits, others)

    async def _todays(self, folder: Folder) -> Ledger:
        today = datetime.now(UTC).date().isoformat()
        if self._ledger is None or self._ledger.day != today:
            self._ledger = await asyncio.to_thread(_read, folder, today)
        return self._ledger


@dataclass(slots=True, kw_only=True)
class Settling:
    """One replica's part: it settles its purse. state: the folder or store of the ledgers."""

    purse: Purse
    replica: str
    state: str
    ask: Callable[[Bill], Awaitable[Lent]]
    _running: asyncio.Task[None] | None = field(default=None, init=False)
    _n_bills: int = field(default=0, init=False)
    _unheard: Bill | None = field(default=None, init=False)  # one and the same until it is heard

    def start(self) -> None:
        """From now on, until ``leave``. Where nobody answers, the replica's leases run out."""
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def leave(self) -> None:
        """The last word of a replica that stops in order. Where nobody hears it, as all of Serve
        may be stopping, it is kept for the next ledger that is read."""
        if self._running:
            self._running.cancel()
        if self._unheard:
            await self._settle(LEAVES_WITHIN_S)
        if not self._unheard:
            await self._settle(LEAVES_WITHIN_S, leaves=True)
        if self._unheard and (left := self.purse.bill()):
            with contextlib.suppress(TimeoutError, JourneymanError):
                async with asyncio.timeout(LEAVES_WITHIN_S):
                    await asyncio.to_thread(_leave_words, Folder(self.state), self.replica, left)

    async def _run(self) -> None:
        while True:
            await self._settle(TIMEOUT_S)
            await asyncio.sleep(EVERY_S)

    async def _settle(self, within_s: float, leaves: bool = False) -> None:
        bill = self._unheard = self._unheard or self._next_bill(leaves)
        with contextlib.suppress(RayError, RayServeException, TimeoutError, JourneymanError):
            async with asyncio.timeout(within_s):
                lent = await self.ask(bill)
            self.purse.settled(bill.spent, lent)
            self._unheard = None

    def _next_bill(self, leaves: bool) -> Bill:
        self._n_bills += 1
        return Bill(
            replica=self.replica,
            number=self._n_bills,
            spent=self.purse.bill(),
            holds=self.purse.leases,
            limits=self.purse.limits,
            state=self.state,
            leaves=leaves,
        )


def _read(folder: Folder, day: str) -> Ledger:
    """With what replicas have left beside it, which counts twice, rather than not at all, where it
    cannot be removed."""
    ledger = _read_one(folder, _ledger_name(day)) or Ledger(day)
    words = [one.name for one in folder.walk(f"budgets/{day}")]
    for name in words:
        if left := _read_one(folder, name):
            ledger = ledger.paid(left.spent)
    if words:
        folder.put(_ledger_name(day), ledger.to_json())
    for name in words:
        with contextlib.suppress(ClusterError):
            folder.delete(name)
    return ledger


def _read_one(folder: Folder, name: str) -> Ledger | None:
    try:
        return Ledger.from_json(folder.get(name), folder.path(name))
    except FileNotFoundError:
        return None


def _leave_words(folder: Folder, replica: str, spent: Mapping[str, float]) -> None:
    day = datetime.now(UTC).date().isoformat()
    folder.put(f"budgets/{day}/{replica}.json", Ledger(day, spent).to_json())


def _ledger_name(day: str) -> str:
    return f"budgets/{day}.json"
