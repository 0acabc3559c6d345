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
from dataclasses import dataclass, field, replace

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade import spooling, watching
from journeyman.cascade.budgets import Lent
from journeyman.cascade.drift import Watch
from journeyman.cascade.orphans import Orphan, Orphans
from journeyman.cascade.sharing import News, Shared, SharedBreaker
from journeyman.cascade.watching import Kept, Outcome
from journeyman.errors import JourneymanError
from journeyman.folder import Folder
from serve.billing import EVERY_S, GONE_AFTER_S, Bill, Billing
from serve.tallies import Tallies, Tally

_REMEMBERED_S = 86400.0  # the number of a member that is gone, or was only thought to be
_OWED_S = 10.0  # between two times that only what is owed is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one replica has to say of one bundle.

    member: who audits, another one each time that a bundle comes to a replica, or one that is gone,
    for which another one goes on; n_owed: further audits, whose outcomes come later; leaves: it is
    its last report; takes_up: whether it would go on for another one; fresh: the bundle's watch, if
    nobody has begun one; feedback: the folder or store beside whose files it is kept, None where
    nobody audits; tally: what it has counted, None where it leaves or goes on for another one.
    """

    replica: str
    bundle: str
    news: News | None
    member: str = ""
    audits: tuple[Outcome, ...] = ()
    n_owed: int = 0
    leaves: bool = False
    takes_up: bool = False
    fresh: Watch | None = None
    feedback: str | None = None
    tally: Tally | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """n_teachers: that run, where they may sleep; n_replicas: of the ingress; others: what all but
    the one that asks have counted; accept_above: what
    the audits leave of the certified threshold, None where none watches; orphan: that who asked is
    to take up, if it can; n_lost, n_stopped: of audits that were given up just now, those that
    count as an error, and those that are left out."""

    breaker: Shared
    n_teachers: int
    n_replicas: int
    others: Tally = field(default_factory=Tally)
    accept_above: float | None = None
    n_audits: int = 0
    rung: int | None = 0
    last: int = 0
    orphan: Orphan | None = None
    n_lost: int = 0
    n_stopped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Of a member: when it was heard last, what it said then, which may be in no watch yet, and how
    many audits are to come behind that."""

    at: float
    n_owed: int
    audits: tuple[Outcome, ...] = ()
    left: bool = False
    takes_up: bool = False


class Agreement:
    """The deployment's one replica."""

    def __init__(self, probe_timeout_s: float, teacher_may_sleep: bool = False) -> None:
        """teacher_may_sleep: only then its replicas are counted."""
        self._teacher_may_sleep = teacher_may_sleep
        self._breaker = SharedBreaker(probe_timeout_s)
        self._kept: dict[str, Kept] = {}  # by bundle
        self._written: dict[str, tuple[Kept, float]] = {}  # by bundle, and when
        self._seen: dict[str, dict[str, _Seen]] = {}  # by bundle, by member
        self._orphans: dict[str, Orphans] = {}  # by bundle
        self._over: dict[str, dict[str, float]] = {}  # members, by bundle, and since when
        self._left_words: dict[str, set[str]] = {}  # to be read: of members, by bundle
        self._counted_words: dict[str, set[str]] = {}  # to be deleted
        self._heard_at: dict[str, float] = {}  # by replica
        self._writing = asyncio.Lock()
        self._billing = Billing()
        self._tallies = Tallies()
        self._n_teachers, self._counted_at = 0, -EVERY_S

    async def exchange(self, report: Report) -> Agreed:
        """A replica's news in, what all agree on out; raises ClusterError if it cannot be kept."""
        now = time.monotonic()
        self._breaker.heard(report.news, now)
        shared = self._breaker.state(report.replica, now)
        await self._count_teachers(now)
        n_replicas = self._count_replicas(report.replica, now)
        others = self._tallies.others(report.bundle, report.member, report.tally, now)
        agreed = Agreed(
            breaker=shared, n_teachers=self._n_teachers, n_replicas=n_replicas, others=others
        )
        return await self._audited(report, agreed, now)

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

    async def _audited(self, report: Report, agreed: Agreed, now: float) -> Agreed:
        """What is agreed after a report, which is known here until it is kept; of audits nothing
        where nobody makes any."""
        bundle, member = report.bundle, report.member
        if report.feedback is None or not (report.fresh or bundle in self._kept):
            return agreed
        folder, seen = Folder(report.feedback), self._seen.setdefault(bundle, {})
        seen[member] = _Seen(
            at=now,
            n_owed=report.n_owed,
            audits=report.audits,
            left=report.leaves,
            takes_up=report.takes_up,
        )
        async with self._writing:
            orphans = self._orphans.setdefault(bundle, Orphans())
            kept = await self._kept_of(report, folder, now)
            gone = self._gone(bundle, member, now)
            given_up = orphans.given_up(gone, now)
            read = await self._read_all_words(folder, bundle, kept, {*orphans.new, *given_up})
            for name in (gone := self._gone(bundle, member, now)):
                kept = kept.told(name, seen[name].audits, seen[name].n_owed)
            # While words are there they may be read again, so the number up to which they counted
            # stays.
            over = [
                name
                for name in gone
                if name not in read and name not in self._counted_words[bundle]
                if name in given_up or (seen[name].left and not kept.owed_by(name))
            ]
            n_owed = [kept.owed_by(name) for name in over if kept.owed_by(name)]
            for name in over:
                kept = kept.gone(name, kept.owed_by(name))
            kept = kept.told(member, report.audits, report.n_owed)
            since = self._over.setdefault(bundle, {})
            old = [n for n, at in since.items() if n not in seen and now - at > _REMEMBERED_S]
            kept = kept.forgot(old)
            await self._keep(folder, bundle, kept, now)
            for name in over:
                seen.pop(name, None)
                since[name] = now
            for name in old:
                del since[name]
            self._counted_words[bundle] |= read
            self._left_words[bundle].clear()
            await self._forget_words(folder, bundle)
        if over:
            await asyncio.to_thread(_forget_texts, folder, bundle, over)
        orphan = self._orphan_for(report, kept, [n for n in gone if n not in over], now)
        return replace(
            agreed,
            accept_above=kept.watch.threshold,
            n_audits=kept.watch.n_audits,
            rung=kept.watch.rung,
            last=kept.last_of(member),
            orphan=orphan,
            n_lost=len(n_owed),
            n_stopped=sum(n_owed) - len(n_owed),
        )

    def _gone(self, bundle: str, but: str, now: float) -> list[str]:
        """Members that were not heard for long, or stopped and owe something."""
        return [
            name
            for name, one in self._seen[bundle].items()
            if name != but and (now - one.at > GONE_AFTER_S or (one.left and one.n_owed))
        ]

    def _orphan_for(self, report: Report, kept: Kept, gone: list[str], now: float) -> Orphan | None:
        """Of those that are gone, the one that who reports is to take up."""
        if not report.takes_up:
            return None
        seen = self._seen[report.bundle]
        living = [n for n, one in seen.items() if one.takes_up and n not in gone and not one.left]
        orphans = self._orphans.setdefault(report.bundle, Orphans())
        gone = sorted(gone, key=lambda name: not kept.owed_by(name))
        name = orphans.offered(gone, report.member, living, now)
        if name is None:
            return None
        return Orphan(member=name, last=kept.last_of(name), n_owed=kept.owed_by(name))

    async def _read_all_words(
        self, folder: Folder, bundle: str, kept: Kept, of: set[str]
    ) -> set[str]:
        """Of these, and those that could not be read, or not be kept, before; who left any. The
        names of a day may be many, and few have any, so they are listed first."""
        to_read = self._left_words[bundle]
        to_read |= of - self._counted_words[bundle]
        if not to_read:
            return set()
        there = await asyncio.to_thread(watching.who_left_words, folder, bundle)
        return {
            name
            for name in sorted(to_read.intersection(there))
            if await self._read_words(folder, bundle, name, kept.last_of(name))
        }

    async def _read_words(self, folder: Folder, bundle: str, name: str, last: int) -> bool:
        """The last ones of a member that stopped and was not heard; whether there are any."""
        words = await asyncio.to_thread(watching.read_last_words, folder, bundle, name, last)
        if words is not None:
            outcomes, n_owed = words
            before = self._seen[bundle].get(name)
            said = before.audits if before else ()
            known = {one.number for one in said}
            said += tuple(one for one in outcomes if one.number not in known)
            self._seen[bundle][name] = _Seen(at=-math.inf, n_owed=n_owed, audits=said, left=True)
        return words is not None

    async def _forget_words(self, folder: Folder, bundle: str) -> None:
        """Those that counted. Where they cannot be deleted, that is tried with each report."""
        for name in sorted(self._counted_words[bundle]):
            with contextlib.suppress(JourneymanError):
                await asyncio.to_thread(watching.forget_last_words, folder, bundle, name)
                self._counted_words[bundle].discard(name)

    async def _keep(self, folder: Folder, bundle: str, kept: Kept, now: float) -> None:
        if self._must_write(bundle, kept, now):
            try:
                await asyncio.to_thread(watching.store, folder, bundle, kept)
            except JourneymanError:
                # What they left may be there, too: they have more time.
                self._orphans.pop(bundle, None)
                raise
            self._written[bundle] = kept, now
        self._kept[bundle] = kept

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
            self._left_words[bundle], self._counted_words[bundle] = set(words), set()
            self._kept[bundle], self._written[bundle] = kept, (kept, -math.inf)
        return self._kept[bundle]


def _forget_texts(folder: Folder, bundle: str, members: list[str]) -> None:
    """That they handed on, and nobody needs any more."""
    for name in members:
        with contextlib.suppress(JourneymanError):
            spooling.forget_handed_on(folder, bundle, name)


def _running_teachers() -> int:
    name = serve.get_replica_context().app_name
    application = serve.status().applications.get(name)
    teacher = application and application.deployments.get("Teacher")
    return teacher.replica_states.get("RUNNING", 0) if teacher else 0
