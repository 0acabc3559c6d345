"""A replica's part in what all agree on, for one bundle: it hands on what its audits found, and
goes on for another one that is gone, where it can read what that left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade import watching
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.breaker import Breaker
from journeyman.cascade.drift import Watch
from journeyman.cascade.orphans import Orphan
from journeyman.cascade.spooling import Entry, Spool, Spools, whole
from journeyman.cascade.watching import Outcome
from journeyman.errors import JourneymanError
from serve.agreement import Agreed, Report
from serve.billing import EVERY_S, LEAVES_WITHIN_S, TIMEOUT_S
from serve.failures import failed
from serve.tallies import Tally

_ON_ITS_WAY_S = 60.0  # to a store, from a replica that stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of audits. lost, left_out, not_drawn, judged: see ``Auditor``; stopped: of members that are
    gone, which nobody could take up."""

    pending: int
    lost: int
    left_out: int
    not_drawn: int
    judged: int
    stopped: int


@dataclass(slots=True, kw_only=True)
class Member:
    """One replica's part in it, for one bundle.

    breaker: None of one that goes on for another one; keep: a file of this name among the
    feedback's, now or later; spools: of the bundle's members; spool: its own, to which the auditor
    writes; heir: an auditor for what another member left, None where that is not taken up; work:
    what an auditor does, as long as the bundle is served; tally: what the replica has counted.
    """

    replica: str
    bundle: str
    fresh: Watch | None
    feedback: str | None
    breaker: Breaker | None
    auditor: Auditor | None
    tighten: Callable[[float], None]
    ask: Callable[[Report], Awaitable[Agreed]]
    heard: Callable[[Agreed], None]
    keep: Callable[[str, bytes], None] | None = None
    spools: Spools | None = None
    spool: Spool | None = None
    heir: Callable[[Spool], Auditor] | None = None
    work: Callable[[Auditor], Coroutine[Any, Any, None]] = Auditor.run
    tally: Callable[[], Tally] = Tally
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    last: Agreed | None = field(default=None, init=False)
    failure: str | None = field(default=None, init=False)  # why it goes on alone
    _stops: bool = field(default=False, init=False)
    _leaves: bool = field(default=False, init=False)  # its next report is the last
    _has_left: bool = field(default=False, init=False)
    _is_behind: bool = field(default=False, init=False)  # another one has told more by its name
    _audits: tuple[Outcome, ...] = field(default=(), init=False)  # not handed on yet
    _heirs: list[Member] = field(default_factory=list, init=False)  # those that are done included
    _taking_up: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _last_heard: int = 0  # the number of the last audit that counted
    _last_kept: int = field(default=0, init=False)  # and of the last handed on
    _n_lost: int = field(default=0, init=False)  # of members that are gone
    _n_stopped: int = field(default=0, init=False)

    async def run(self) -> None:
        """Exchange, as long as the bundle is served."""
        cleaning = asyncio.get_running_loop().create_task(self._clean())
        try:
            while True:
                await self._round()
        finally:
            cleaning.cancel()

    async def _clean(self) -> None:
        """A store may take its time, and whatever is wrong here ends nothing else."""
        if self.spools:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self.spools.clean)

    async def _round(self) -> None:
        """One exchange and the pause behind it. An error that nobody thought of ends this round,
        and not those to come; it is told without its words, which may quote a text."""
        try:
            await self.exchange()
        except Exception as error:
            self._is_alone(str(failed(error)))
        await asyncio.sleep(EVERY_S)

    async def leave(self) -> None:
        """The last words of a replica that stops in order, and of those that it went on for. What
        waits is left to another one: beside the feedback for any host, and in the spool while that
        is on its way. Where nobody hears them, they are kept beside the feedback for who comes
        next."""
        self._stops = True
        for task in self._taking_up.values():
            task.cancel()
        heirs = [heir.leave() for heir in self._heirs if not (heir._has_left or heir._is_behind)]
        await asyncio.gather(self._leave(), *heirs)

    def arrived(self) -> None:
        """What it left beside the feedback is there, and needs to be nowhere else."""
        for member in (self, *self._heirs):
            if member.spool:
                member.spool.counted(member._last_kept)

    async def exchange(self) -> None:
        """Once; what cannot be handed on is handed on the next time."""
        news = self.breaker.news if self.breaker else None
        if self.auditor and not self._audits:
            self._audits = tuple(self.auditor.outcomes())
        if self.spool and self.spool.pauses:
            self.spool.resume(self._unheard)
        report = Report(
            replica=self.replica,
            bundle=self.bundle,
            news=news,
            member=self.name,
            audits=self._audits,
            n_owed=self.auditor.n_unkept if self.auditor else 0,
            leaves=self._leaves,
            takes_up=bool(self.heir and self.spools and not self._stops),
            fresh=self.fresh,
            feedback=self.feedback,
            tally=self.tally() if self.breaker and not self._leaves else None,
        )
        try:
            async with asyncio.timeout(LEAVES_WITHIN_S if self._stops else TIMEOUT_S):
                agreed = await self.ask(report)
        except (RayError, RayServeException, TimeoutError, JourneymanError) as error:
            self._is_alone(f"{type(error).__name__}: {error}")
            return
        self._agree(agreed)
        if self.breaker:
            if self.breaker.news is news:
                self.breaker.news = None
            self.breaker.follow(agreed.breaker, time.monotonic())

    def _is_alone(self, why: str) -> None:
        self.failure = why
        if self.breaker:
            self.breaker.alone()

    @property
    def unspooled(self) -> str | None:
        """Why audits that wait are in memory alone, if so."""
        return self.spool.failure if self.spool else None

    @property
    def counts(self) -> Counts:
        """Of this replica, with those that it took up."""
        here = [self, *self._heirs]
        auditors = [member.auditor for member in here if member.auditor]
        return Counts(
            pending=sum(m.auditor.n_pending for m in here if m.auditor and not m._is_behind),
            lost=sum(a.n_lost for a in auditors) + sum(member._n_lost for member in here),
            left_out=sum(auditor.n_left_out for auditor in auditors),
            not_drawn=sum(auditor.n_not_drawn for auditor in auditors),
            judged=sum(auditor.n_judged for auditor in auditors),
            stopped=sum(member._n_stopped for member in here),
        )

    def _agree(self, agreed: Agreed) -> None:
        """After a report that was heard."""
        if self._audits:
            self._last_heard = self._audits[-1].number
        self._is_behind = self.breaker is None and agreed.last > self._last_heard
        if self._audits and self.spool and not self._is_behind:
            self.spool.counted(self._last_heard)
        self.last, self.failure, self._audits = agreed, None, ()
        self._n_lost += agreed.n_lost
        self._n_stopped += agreed.n_stopped
        self.heard(agreed)
        if agreed.accept_above is not None:
            self.tighten(agreed.accept_above)
        orphan = agreed.orphan
        if orphan and not self._stops and orphan.member not in self._taking_up:
            task = asyncio.get_running_loop().create_task(self._take_up(orphan))
            self._taking_up[orphan.member] = task
            task.add_done_callback(lambda _: self._taking_up.pop(orphan.member))

    async def _take_up(self, orphan: Orphan) -> None:
        """Go on for a member that is gone, under its name, until its last outcome is heard; or
        leave it to others, where nothing of it is to be read here."""
        assert self.heir and self.spools
        try:
            left = await asyncio.to_thread(
                self.spools.left_by, orphan.member, orphan.last, orphan.n_owed
            )
        except (OSError, JourneymanError):  # it is offered again
            return
        if left is None:
            return
        auditor = self.heir(left.spool)
        auditor.take_up(left.entries)
        heir = replace(
            self,
            name=orphan.member,
            breaker=None,
            auditor=auditor,
            spool=left.spool,
            heir=None,
            _last_heard=orphan.last,
        )
        heir._n_stopped = left.n_stopped
        self._heirs.append(heir)
        working = asyncio.get_running_loop().create_task(self.work(auditor))
        try:
            while not (heir._is_done or heir._is_behind):
                await heir._round()
        finally:
            working.cancel()
        if heir._is_behind:  # the other one is not gone, or has another heir: it is theirs
            return
        await heir.leave()
        await asyncio.sleep(_ON_ITS_WAY_S)
        await heir._forget()  # what it handed on may have come behind its last words

    @property
    def _is_done(self) -> bool:
        """Whether nothing of what was taken up is left to be told."""
        return not self._audits and (self.auditor is None or not self.auditor.n_unkept)

    async def _leave(self) -> None:
        self._stops = True
        await self.exchange()
        if not self._is_behind:
            await self._hand_on()
            self._leaves = True
        if self._leaves and not self.failure:  # there may be what has come since that report
            await self.exchange()
        if self._is_behind:
            return
        if self.auditor and self.failure and self.keep:
            found = (*self._audits, *self.auditor.outcomes())
            words = watching.last_words(self.bundle, self.name, found, self.auditor.n_unkept)
            with contextlib.suppress(OSError):  # then they stay owed
                self.keep(*words)
        elif self._is_done and self.spool:
            self.spool.drop()
            if self.breaker is None:
                await self._forget()
        self._has_left = True

    async def _forget(self) -> None:
        """What one that was taken up handed on. Where that cannot be deleted, it stays and says
        nothing new."""
        if self.spools:
            with contextlib.suppress(JourneymanError, TimeoutError):
                async with asyncio.timeout(LEAVES_WITHIN_S):
                    await asyncio.to_thread(self.spools.forget, self.name)

    async def _hand_on(self) -> None:
        """What waits; what comes later lies in the spool alone."""
        if not (self.auditor and self.keep and self.spools):
            return
        entries, spools, keep = self._unheard, self.spools, self.keep
        if not self._is_done:
            with contextlib.suppress(OSError):  # it lies in the spool
                await asyncio.to_thread(lambda: keep(*spools.handed_on(self.name, entries)))
                self._last_kept = entries[-1].number

    @property
    def _unheard(self) -> list[Entry]:
        """All behind the last audit that was heard, those that are left out too."""
        found = [*self._audits, *(self.auditor.unkept if self.auditor else ())]
        return whole(found, self._last_heard, self.spool.last if self.spool else 0)
