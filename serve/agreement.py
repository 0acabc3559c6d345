"""What the replicas of a cascade agree on: its threshold, as the audits leave it, and its breaker.

One replica of one small deployment. The ingress decides by what it heard last and goes on without
it where it is away, so nothing waits for it. What the audits found is written beside the feedback
before anybody acts on it, and read again after a restart: a threshold is never loosened by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade import watching
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.budgets import Lent
from journeyman.cascade.drift import Audit, Watch
from journeyman.cascade.sharing import News, Shared, SharedBreaker
from journeyman.cascade.watching import Batch, Kept
from journeyman.errors import JourneymanError
from journeyman.folder import Folder
from serve.billing import EVERY_S, GONE_AFTER_S, LEAVES_WITHIN_S, TIMEOUT_S, Bill, Billing

_OWED_S = 10.0  # between two times that only what is owed is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one replica has to say of one bundle.

    member: who audits, another one each time that a bundle comes to a replica; batch: the number of
    these audits, so that a report that is sent again counts once; n_owed: further audits, whose
    outcomes come later; fresh: the bundle's watch, if nobody has begun one; feedback: the folder or
    store beside whose files it is kept, None where nobody audits.
    """

    replica: str
    bundle: str
    news: News | None
    member: str = ""
    batch: int = 0
    audits: tuple[Audit, ...] = ()
    n_owed: int = 0
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
    """Of a member: when it was heard last, its last batch, which may be in no watch yet, and how
    many audits are to come behind it."""

    at: float
    n_owed: int
    batch: Batch = (0, ())


class Agreement:
    """The deployment's one replica."""

    def __init__(self, probe_timeout_s: float, teacher_may_sleep: bool = False) -> None:
        """teacher_may_sleep: only then its replicas are counted."""
        self._teacher_may_sleep = teacher_may_sleep
        self._breaker = SharedBreaker(probe_timeout_s)
        self._kept: dict[str, Kept] = {}  # by bundle
        self._written: dict[str, tuple[Kept, float]] = {}  # by bundle, and when
        self._seen: dict[str, dict[str, _Seen]] = {}  # by bundle, by member
        self._left_words: dict[str, list[str]] = {}  # members, by bundle
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
        kept = await self._audited(report, now)
        if kept is None:
            return Agreed(breaker=shared, n_teachers=self._n_teachers, n_replicas=n_replicas)
        return Agreed(
            breaker=shared,
            n_teachers=self._n_teachers,
            n_replicas=n_replicas,
            accept_above=kept.watch.threshold,
            n_audits=kept.watch.n_audits,
            rung=kept.watch.rung,
        )

    async def settle(self, bill: Bill) -> Lent:
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

    async def _audited(self, report: Report, now: float) -> Kept | None:
        """What is kept after a report, which is known here until it is; None where nobody
        audits."""
        bundle, member = report.bundle, report.member
        if report.feedback is None or not (report.fresh or bundle in self._kept):
            return None
        folder, seen = Folder(report.feedback), self._seen.setdefault(bundle, {})
        batch: Batch = (report.batch, report.audits)
        seen[member] = _Seen(at=now, n_owed=report.n_owed, batch=batch)
        async with self._writing:
            kept = await self._kept_of(report, folder, now)
            gone = [name for name, one in seen.items() if now - one.at > GONE_AFTER_S]
            for name in (left := {*gone, *self._left_words[bundle]}):
                dead = seen[name] if name in gone else None
                kept = await self._without(kept, folder, bundle, name, dead)
            kept = kept.told(member, [batch], report.n_owed)
            if self._must_write(bundle, kept, now):
                await asyncio.to_thread(watching.store, folder, bundle, kept)
                self._written[bundle] = kept, now
            self._kept[bundle] = kept
            for name in left:
                seen.pop(name, None)
                await asyncio.to_thread(watching.forget_last_words, folder, bundle, name)
            self._left_words[bundle] = []
        return kept

    def _must_write(self, bundle: str, kept: Kept, now: float) -> bool:
        """What is owed changes with every request, so that alone is written now and then; or it
        would be an error once the one that has paid is gone."""
        written, at = self._written[bundle]
        paid = any(one.n_owed and not kept.owed_by(name) for name, one in written.members.items())
        return kept.watch is not written.watch or paid or (kept != written and now > at + _OWED_S)

    async def _kept_of(self, report: Report, folder: Folder, now: float) -> Kept:
        """Whom it names was there before this deployment's replica was, and has a while to be
        heard."""
        bundle, fresh = report.bundle, report.fresh
        if bundle not in self._kept:
            found = await asyncio.to_thread(watching.stored, folder, bundle)
            words = await asyncio.to_thread(watching.who_left_words, folder, bundle)
            assert fresh is not None
            kept = found or Kept(watch=fresh)
            for name, heard in kept.members.items():
                self._seen[bundle].setdefault(name, _Seen(at=now, n_owed=heard.n_owed))
            self._left_words[bundle] = words
            self._kept[bundle], self._written[bundle] = kept, (kept, -math.inf)
        return self._kept[bundle]

    async def _without(
        self, kept: Kept, folder: Folder, bundle: str, gone: str, dead: _Seen | None
    ) -> Kept:
        """One member. What it owed died with it, unless it has left words."""
        words = await asyncio.to_thread(watching.read_last_words, folder, bundle, gone)
        if words is not None:
            return kept.told(gone, words, 0)
        if dead is None:
            return kept.gone(gone, 0)
        return kept.told(gone, [dead.batch], 0).gone(gone, dead.n_owed)


def _running_teachers() -> int:
    name = serve.get_replica_context().app_name
    application = serve.status().applications.get(name)
    teacher = application and application.deployments.get("Teacher")
    return teacher.replica_states.get("RUNNING", 0) if teacher else 0


@dataclass(slots=True, kw_only=True)
class Member:
    """One replica's part in it, for one bundle. keep: a file of this name among the feedback's, now
    or later."""

    replica: str
    bundle: str
    fresh: Watch | None
    feedback: str | None
    breaker: Breaker
    auditor: Auditor | None
    tighten: Callable[[float], None]
    ask: Callable[[Report], Awaitable[Agreed]]
    heard: Callable[[Agreed], None]
    keep: Callable[[str, bytes], None] | None = None
    last: Agreed | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)  # why it goes on alone
    _leaves: bool = field(default=False, init=False)
    _name: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _batch: int = field(default=0, init=False)
    _audits: tuple[Audit, ...] = field(default=(), init=False)  # of this batch, not handed on yet

    async def run(self) -> None:
        """Exchange, as long as the bundle is served."""
        while True:
            await self.exchange()
            await asyncio.sleep(EVERY_S)

    async def leave(self) -> None:
        """The last word of a replica that stops in order. Which audits wait then has nothing to do
        with what would have come of them (but for the first: see ``Kept``; stops are too ordinary
        to make an error of each), so they are left out, and not held for errors. Where nobody hears
        it, it is kept beside the feedback for who comes next."""
        self._leaves = True
        await self.exchange()
        if not self.failure:  # there may be what has come since that batch
            await self.exchange()
        if self.auditor and self.failure and self.keep:
            batches: list[Batch] = [(self._batch, self._audits)]
            batches += [(self._batch + 1, self.auditor.outcomes())]
            with contextlib.suppress(OSError):  # then they stay owed
                self.keep(*watching.last_words(self.bundle, self._name, batches))

    async def exchange(self) -> None:
        """Once; what cannot be handed on is handed on the next time."""
        news = self.breaker.news
        if self.auditor and not self._audits:
            self._audits, self._batch = tuple(self.auditor.outcomes()), self._batch + 1
        report = Report(
            replica=self.replica,
            bundle=self.bundle,
            news=news,
            member=self._name,
            batch=self._batch,
            audits=self._audits,
            n_owed=self._n_owed,
            fresh=self.fresh,
            feedback=self.feedback,
        )
        try:
            async with asyncio.timeout(LEAVES_WITHIN_S if self._leaves else TIMEOUT_S):
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

    @property
    def _n_owed(self) -> int:
        """Audits whose outcomes are in none of the batches so far."""
        if self.auditor is None:
            return 0
        return self.auditor.n_found if self._leaves else self.auditor.n_unkept
