"""What the replicas of a cascade agree on: its threshold, as the audits leave it, and its breaker.

One replica of one small deployment. The ingress decides by what it heard last and goes on without
it where it is away, so nothing waits for it. What the audits found is written beside the feedback
before anybody acts on it, and read again after a restart: a threshold is never loosened by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade import watching
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.budgets import Ledger, Purse
from journeyman.cascade.drift import Audit, Watch
from journeyman.cascade.sharing import News, Shared, SharedBreaker
from journeyman.errors import JourneymanError
from journeyman.labels.folder import Folder

_EXCHANGE_EVERY_S = 1.0
_EXCHANGE_TIMEOUT_S = 10.0
_GONE_AFTER_S = 60.0  # without a word of it, a replica is dead, and what it had pending is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one replica has to say of one bundle.

    batch: the number of these audits, so that a report that is sent again counts once; fresh: the
    bundle's watch, if nobody has begun one; feedback: the folder or store beside whose files it is
    kept, None where nobody audits.
    """

    replica: str
    bundle: str
    news: News | None
    batch: int = 0
    audits: tuple[Audit, ...] = ()
    n_pending: int = 0
    fresh: Watch | None = None
    feedback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """n_teachers: replicas of the teacher that run; accept_above: what the audits leave of the
    certified threshold, None where none watches."""

    breaker: Shared
    n_teachers: int
    accept_above: float | None = None
    n_audits: int = 0
    rung: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one replica's keys have spent since it settled last; number: of this bill, so that one
    that is sent again counts once; state: the folder or store where the ledgers are."""

    replica: str
    number: int
    spent: Mapping[str, float]
    limits: Mapping[str, float]
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settled:
    """A replica's last bill: its number, when it came, and what it may spend since."""

    number: int
    at: float
    leases: dict[str, float]


@dataclass(slots=True)
class _Seen:
    at: float = 0.0
    n_pending: int = 0
    batch: int = 0


class Agreement:
    """The deployment's one replica."""

    def __init__(self, probe_timeout_s: float) -> None:
        self._breaker = SharedBreaker(probe_timeout_s)
        self._watches: dict[str, Watch] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._writing = asyncio.Lock()
        self._ledger: Ledger | None = None
        self._settled: dict[str, _Settled] = {}  # by replica
        self._n_teachers, self._counted_at = 0, -_EXCHANGE_EVERY_S

    async def exchange(self, report: Report) -> Agreed:
        """A replica's news in, what all agree on out; raises ClusterError if it cannot be kept."""
        now = time.monotonic()
        self._breaker.heard(report.news, now)
        shared = self._breaker.state(report.replica, now)
        await self._count_teachers(now)
        async with self._writing:
            watch = await self._watch(report)
            if watch is None:
                return Agreed(breaker=shared, n_teachers=self._n_teachers)
            seen = self._seen.setdefault((report.replica, report.bundle), _Seen())
            seen.at, seen.n_pending = now, report.n_pending
            audits = [*report.audits] if report.batch > seen.batch else []
            audits += self._lost(report.bundle, now)
            for audit in audits:
                watch = watch.audited(audit)
            if audits and report.feedback:
                folder = Folder(report.feedback)
                await asyncio.to_thread(watching.store, folder, report.bundle, watch)
            self._watches[report.bundle], seen.batch = watch, report.batch
        return Agreed(
            breaker=shared,
            n_teachers=self._n_teachers,
            accept_above=watch.threshold,
            n_audits=watch.n_audits,
            rung=watch.rung,
        )

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
                if replica != bill.replica and now - one.at < _GONE_AFTER_S
            ]
            leases = ledger.leases(bill.limits, others)
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

    async def _count_teachers(self, now: float) -> None:
        """Here, so that the controller is asked once, however many replicas want to know."""
        if now < self._counted_at + _EXCHANGE_EVERY_S:
            return
        self._counted_at = now
        with contextlib.suppress(RayError, RayServeException):
            self._n_teachers = await asyncio.to_thread(_running_teachers)

    async def _watch(self, report: Report) -> Watch | None:
        if report.bundle in self._watches or report.fresh is None or report.feedback is None:
            return self._watches.get(report.bundle)
        folder = Folder(report.feedback)
        return await asyncio.to_thread(watching.stored, folder, report.bundle) or report.fresh

    def _lost(self, bundle: str, now: float) -> list[Audit]:
        """Audits that died with their replica: errors, for all anyone knows."""
        gone = [
            key
            for key, seen in self._seen.items()
            if key[1] == bundle and now - seen.at > _GONE_AFTER_S
        ]
        return [watching.LOST] * sum(self._seen.pop(key).n_pending for key in gone)


def _ledger_name(day: str) -> str:
    return f"budgets/{day}.json"


def _running_teachers() -> int:
    name = serve.get_replica_context().app_name
    application = serve.status().applications.get(name)
    teacher = application and application.deployments.get("Teacher")
    return teacher.replica_states.get("RUNNING", 0) if teacher else 0


@dataclass(slots=True, kw_only=True)
class Member:
    """One replica's part in it, for one bundle."""

    replica: str
    bundle: str
    fresh: Watch | None
    feedback: str | None
    breaker: Breaker
    auditor: Auditor | None
    tighten: Callable[[float], None]
    ask: Callable[[Report], Awaitable[Agreed]]
    teachers: Callable[[int], None]  # told how many run
    last: Agreed | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)  # why it goes on alone
    _batch: int = field(default=0, init=False)
    _audits: tuple[Audit, ...] = field(default=(), init=False)  # of this batch, not handed on yet

    async def run(self) -> None:
        """Exchange, as long as the bundle is served."""
        while True:
            await self.exchange()
            await asyncio.sleep(_EXCHANGE_EVERY_S)

    async def exchange(self) -> None:
        """Once; what cannot be handed on is handed on the next time."""
        news = self.breaker.news
        if self.auditor and not self._audits:
            self._audits, self._batch = tuple(self.auditor.outcomes()), self._batch + 1
        report = Report(
            replica=self.replica,
            bundle=self.bundle,
            news=news,
            batch=self._batch,
            audits=self._audits,
            n_pending=self.auditor.n_pending if self.auditor else 0,
            fresh=self.fresh,
            feedback=self.feedback,
        )
        try:
            async with asyncio.timeout(_EXCHANGE_TIMEOUT_S):
                agreed = await self.ask(report)
        except (RayError, RayServeException, TimeoutError, JourneymanError) as error:
            self.breaker.alone()
            self.failure = f"{type(error).__name__}: {error}"
            return
        self.last, self.failure, self._audits = agreed, None, ()
        if self.breaker.news is news:
            self.breaker.news = None
        self.teachers(agreed.n_teachers)
        self.breaker.follow(agreed.breaker, time.monotonic())
        if agreed.accept_above is not None:
            self.tighten(agreed.accept_above)


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
                limits=purse.limits,
                state=state,
            )
        with contextlib.suppress(RayError, RayServeException, TimeoutError, JourneymanError):
            async with asyncio.timeout(_EXCHANGE_TIMEOUT_S):
                leases = await ask(bill)
            purse.settled(bill.spent, leases)
            bill = None
        await asyncio.sleep(_EXCHANGE_EVERY_S)
