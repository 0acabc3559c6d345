"""What the replicas of a cascade agree on: its threshold, as the audits leave it, and its breaker.

One replica of one small deployment. The ingress decides by what it heard last and goes on without
it where it is away, so nothing waits for it. What the audits found is written beside the feedback
before anybody acts on it, and read again after a restart: a threshold is never loosened by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade import watching
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.drift import Audit, Watch
from journeyman.cascade.sharing import News, Shared, SharedBreaker
from journeyman.errors import JourneymanError
from journeyman.folder import Folder
from serve.billing import EVERY_S, GONE_AFTER_S, TIMEOUT_S, Bill, Billing


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
    """n_teachers: that run, where they may sleep; n_replicas: of the ingress; accept_above: what
    the audits leave of the certified threshold, None where none watches."""

    breaker: Shared
    n_teachers: int
    n_replicas: int
    accept_above: float | None = None
    n_audits: int = 0
    rung: int | None = 0


@dataclass(slots=True)
class _Seen:
    at: float = 0.0
    n_pending: int = 0
    batch: int = 0


class Agreement:
    """The deployment's one replica."""

    def __init__(self, probe_timeout_s: float, teacher_may_sleep: bool = False) -> None:
        """teacher_may_sleep: only then its replicas are counted."""
        self._teacher_may_sleep = teacher_may_sleep
        self._breaker = SharedBreaker(probe_timeout_s)
        self._watches: dict[str, Watch] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._heard_at: dict[str, float] = {}  # by replica
        self._writing = asyncio.Lock()
        self._billing = Billing()
        self._n_teachers, self._counted_at = 0, -EVERY_S

    async def exchange(self, report: Report) -> Agreed:
        """A replica's news in, what all agree on out; raises ClusterError if it cannot be kept."""
        now = time.monotonic()
        self._breaker.heard(report.news, now)
        shared = self._breaker.state(report.replica, now)
        await self._count_teachers(now)
        n_replicas = self._count_replicas(report.replica, now)
        async with self._writing:
            watch = await self._watch(report)
            if watch is None:
                return Agreed(breaker=shared, n_teachers=self._n_teachers, n_replicas=n_replicas)
            seen = self._seen.setdefault((report.replica, report.bundle), _Seen())
            seen.at, seen.n_pending = now, report.n_pending
            audits = [*report.audits] if report.batch > seen.batch else []
            gone = self._gone(report.bundle, now)
            audits += [watching.LOST] * sum(self._seen[key].n_pending for key in gone)
            for audit in audits:
                watch = watch.audited(audit)
            if audits and report.feedback:
                folder = Folder(report.feedback)
                await asyncio.to_thread(watching.store, folder, report.bundle, watch)
            self._watches[report.bundle], seen.batch = watch, report.batch
            for key in gone:
                del self._seen[key]
        return Agreed(
            breaker=shared,
            n_teachers=self._n_teachers,
            n_replicas=n_replicas,
            accept_above=watch.threshold,
            n_audits=watch.n_audits,
            rung=watch.rung,
        )

    async def settle(self, bill: Bill) -> dict[str, float]:
        """See ``Billing.settle``."""
        return await self._billing.settle(bill)

    def _count_replicas(self, replica: str, now: float) -> int:
        """Of the ingress, the one that asks included."""
        self._heard_at = {r: at for r, at in self._heard_at.items() if now - at <= GONE_AFTER_S}
        self._heard_at[replica] = now
        return len(self._heard_at)

    async def _count_teachers(self, now: float) -> None:
        """Here, so that the controller is asked once, however many replicas want to know."""
        if not self._teacher_may_sleep or now < self._counted_at + EVERY_S:
            return
        self._counted_at = now
        with contextlib.suppress(RayError, RayServeException):
            self._n_teachers = await asyncio.to_thread(_running_teachers)

    async def _watch(self, report: Report) -> Watch | None:
        if report.bundle in self._watches or report.fresh is None or report.feedback is None:
            return self._watches.get(report.bundle)
        folder = Folder(report.feedback)
        return await asyncio.to_thread(watching.stored, folder, report.bundle) or report.fresh

    def _gone(self, bundle: str, now: float) -> list[tuple[str, str]]:
        """Replicas whose audits died with them: errors, for all anyone knows."""
        return [
            key
            for key, seen in self._seen.items()
            if key[1] == bundle and now - seen.at > GONE_AFTER_S
        ]


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
    heard: Callable[[Agreed], None]
    last: Agreed | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)  # why it goes on alone
    _leaves: bool = field(default=False, init=False)
    # Numbers of a bundle that comes back to the same replica go on behind those from before.
    _batch: int = field(default_factory=time.monotonic_ns, init=False)
    _audits: tuple[Audit, ...] = field(default=(), init=False)  # of this batch, not handed on yet

    async def run(self) -> None:
        """Exchange, as long as the bundle is served."""
        while True:
            await self.exchange()
            await asyncio.sleep(EVERY_S)

    async def leave(self) -> None:
        """The last word of a replica that stops in order. Which audits wait then has nothing to do
        with what would have come of them, so they are left out, and not held for errors."""
        self._leaves = True
        await self.exchange()

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
            n_pending=self.auditor.n_pending if self.auditor and not self._leaves else 0,
            fresh=self.fresh,
            feedback=self.feedback,
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                agreed = await self.ask(report)
        except (RayError, RayServeException, TimeoutError, JourneymanError) as error:
            self.breaker.alone()
            self.failure = f"{type(error).__name__}: {error}"
            return
        self.last, self.failure, self._audits = agreed, None, ()
        if self.breaker.news is news:
            self.breaker.news = None
        self.heard(agreed)
        self.breaker.follow(agreed.breaker, time.monotonic())
        if agreed.accept_above is not None:
            self.tighten(agreed.accept_above)
