"""The ingress deployment: HTTP, the policy, and the student where it is an encoder."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI

from journeyman.cascade import watching
from journeyman.cascade.answering import Cascade
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.budgets import Purse
from journeyman.cascade.drift import Watch
from journeyman.cascade.feedback import Journal
from journeyman.cascade.judge import TeacherAsJudge
from journeyman.cascade.keys import Key, Keyring
from journeyman.cascade.recording import Answering, Recording
from journeyman.cascade.remembering import Remembering
from journeyman.cascade.spooling import Spool, Spools
from journeyman.cascade.stability import Stability
from journeyman.certify import judging
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.errors import ClusterError
from journeyman.folder import Folder
from journeyman.labels import pipeline, taught
from journeyman.recipe import Feedback, digest
from journeyman.teacher.progress import Spent
from serve import apart, loading
from serve.accounts import Account, account
from serve.agreement import Agreed
from serve.asking import TeacherByHandle
from serve.billing import Settling
from serve.http import api
from serve.live import Live, Served
from serve.loading import Loaded
from serve.members import Member
from serve.metrics import Health, Measured
from serve.scaling import BUSY, Busy
from serve.scorers import Scored
from serve.students import Encoders, Reader, Rule, Student, readers
from serve.tallies import Tally
from serve.writers import Writer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


_LAST_AUDITS_S = 1.0  # of requests that end at their deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """All that an ingress replica needs to begin; travels to its actor."""

    loaded: Loaded
    keys: tuple[Key, ...] = ()  # nobody needs one where there is none


class Ingress:
    """Serves a cascade over HTTP."""

    def __init__(
        self,
        spec: IngressSpec,
        teacher: DeploymentHandle,
        agreement: DeploymentHandle,
        student: DeploymentHandle | None = None,
    ) -> None:
        """Loads the student, in Serve's event loop, unless it has a deployment of its own; raises
        ModelError, BundleMismatch."""
        self._spec = spec
        self._agreement = agreement
        self._replica = uuid.uuid4().hex
        self._busy = Busy()
        may_sleep = spec.loaded.recipe.cascade.teacher_replicas.min == 0
        self._teacher = TeacherByHandle(teacher, may_sleep, bill=self._bill)
        self._measured: dict[str, Measured] = {}  # by bundle
        self._loaded: dict[str, Loaded] = {}  # by bundle
        self._apart = student
        limits = {k.sha256: k.dollars_per_day for k in spec.keys if k.dollars_per_day is not None}
        self._purse = Purse(limits)
        self._settling: Settling | None = None
        self._keyring = Keyring(spec.keys, time.monotonic)
        first = self._served(spec.loaded, self._readers(spec.loaded), _watch(spec.loaded))
        self._live = Live(first, self._load)
        state = spec.loaded.recipe.cascade.state
        if limits and state:
            self._settling = Settling(
                purse=self._purse, replica=self._replica, state=state, ask=agreement.settle.remote
            )
            self._settling.start()
        self._watching = asyncio.get_running_loop().create_task(self._teacher.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is made."""
        keyring = self._keyring if self._spec.keys else None
        origins = self._spec.loaded.recipe.cascade.cors_origins
        return api(self._live, self._unready, keyring, self._purse, origins)

    async def __del__(self) -> None:
        """Serve calls this when the replica stops: what is kept becomes files at once, and what
        keys have spent is settled."""
        if hasattr(self, "_live"):
            last_bill = self._settling.leave() if self._settling else asyncio.sleep(0)
            await asyncio.gather(self._live.close(), last_bill)

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Serve calls this when ``user_config`` has changed; see ``live.UserConfig``. rank: only a
        method that takes it is told, too, that there is no ``user_config`` any more (Ray 2.60)."""
        self._live.follow(user_config)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for this where it scales the ingress; see ``scaling``."""
        return {BUSY: self._busy.share()}

    async def answering_now(self, own: str) -> Loaded | None:
        """For replicas of the student that start after an exchange of bundles. own: the bundle of
        their application; None where this is another, which is being replaced by it."""
        if own != self._spec.loaded.bundle.bundle_id:
            return None
        return self._loaded[self._live.bundle.bundle_id]

    def _unready(self) -> str | None:
        """Why not everything can answer yet."""
        return self._teacher.unready or self._live.unready

    async def _load(self, bundle: str | None, but_not: str) -> Served | None:
        """bundle: None is the application's own; but_not: the id of one that answers already, of
        which there is not to be a second."""
        loaded = self._spec.loaded
        if bundle is not None:
            loaded = await asyncio.to_thread(loading.load, bundle)
        if loaded.bundle.bundle_id == but_not:
            return None
        loading.check_fits(loaded, self._spec.loaded)
        if self._apart:
            await apart.started(self._apart, loaded)
        found, watch = await asyncio.to_thread(lambda: (self._readers(loaded), _watch(loaded)))
        return self._served(loaded, found, watch)

    def _readers(self, loaded: Loaded) -> list[Reader]:
        """The students of this process, none where they have a deployment of their own; raises
        ModelError, BundleMismatch."""
        return [] if self._apart else readers(loaded)

    def _heard(self, agreed: Agreed) -> None:
        self._teacher.count(agreed.n_teachers)
        self._keyring.share(agreed.n_replicas)

    def _bill(self, whose: Account, spent: Spent) -> None:
        """For an audit or a request that was given up, by a bundle that may have left since."""
        if not (measured := self._measured.get(whose.bundle)):
            return
        if whose.is_audit:
            measured.audited(spent)
        else:
            measured.given_up(whose.key, spent)

    def _student(self, loaded: Loaded, found: Sequence[Reader], rule: Rule) -> Student:
        if self._apart is None:
            return Encoders(loaded, found, rule, self._busy.worked)
        kind = Writer if isinstance(loaded.bundle, WrittenBundle) else Scored
        return kind(
            self._apart,
            loaded,
            rule,
            answers=lambda: self._live.bundle.bundle_id == loaded.bundle.bundle_id,
            is_up=loaded is not self._spec.loaded,
        )

    def _auditor(
        self,
        loaded: Loaded,
        rule: Rule,
        cascade: Cascade,
        student: Student,
        turn: asyncio.Lock | None = None,
        spool: Spool | None = None,
    ) -> Auditor:
        recipe, bundle, judge = loaded.recipe, loaded.bundle, None
        if loading.is_judged(loaded):
            judge = TeacherAsJudge(recipe, bundle.columns, self._teacher)
        return Auditor(
            rule.policy,
            cascade,
            student,
            busy=lambda: cascade.waiting.n_waiting > 0,
            patience_s=recipe.cascade.request_timeout_s,
            judge=judge,
            rests=lambda: self._teacher.rests or not cascade.breaker.is_closed,
            spool=spool,
            turn=turn,
        )

    async def _audits(self, bundle: str, auditor: Auditor) -> None:
        account.set(Account(ingress=self._replica, bundle=bundle, key=None, is_audit=True))
        await auditor.run()

    def _member(
        self,
        loaded: Loaded,
        rule: Rule,
        cascade: Cascade,
        fresh: Watch | None,
        journal: Journal | None,
        auditor: Callable[[Spool], Auditor] | None,
    ) -> Member:
        """auditor: one that writes to a spool; None where nobody audits."""
        feedback, bundle = loaded.recipe.cascade.feedback, loaded.bundle.bundle_id
        name, spools, spool = uuid.uuid4().hex, None, None
        if feedback and auditor:
            spools = Spools(spool=_spool(feedback), to=Folder(feedback.to), bundle=bundle)
            spool = spools.of(name)
        return Member(
            name=name,
            replica=self._replica,
            bundle=bundle,
            fresh=fresh,
            feedback=feedback.to if feedback else None,
            breaker=cascade.breaker,
            auditor=auditor(spool) if auditor and spool else None,
            tighten=rule.tighten,
            ask=self._agreement.exchange.remote,
            heard=self._heard,
            keep=journal.keep if journal else None,
            spools=spools,
            spool=spool,
            heir=auditor,
            work=partial(self._audits, bundle),
        )

    def _served(
        self, loaded: Loaded, found: Sequence[Reader], watch: Watch | _Unknown | None
    ) -> Served:
        """Everything that answers by one bundle, started."""
        bundle, settings = loaded.bundle, loaded.recipe.cascade
        rule = _rule(loaded, watch)
        student = self._student(loaded, found, rule)
        cascade = Cascade(
            rule.policy, student, self._teacher, settings, student_wait_s=lambda: student.wait_s
        )
        answering: Answering = cascade
        if settings.remembered_texts:
            answering = remembering = Remembering(cascade, settings.remembered_texts)
            rule.when_changed = remembering.forget
        kept, turn = settings.feedback, asyncio.Lock()
        journal = _journal(kept) if kept else None
        audits = partial(self._auditor, loaded, rule, cascade, student, turn)
        fresh = watching.watch_of(bundle) if watch == _UNKNOWN else watch
        member = self._member(
            loaded, rule, cascade, fresh, journal, audits if kept and watch is not None else None
        )
        if kept and journal:
            answering = Recording(
                answering, journal, kept.audit_rate, bundle.bundle_id,
                auditor=member.auditor, is_outside=rule.is_outside, how_asked=_how_asked(loaded),
                is_held=lambda: rule.is_held,
            )  # fmt: skip
        health = Health(member, self._purse, Stability(bundle.curve, bundle.served.n), journal)
        measured = Measured(
            answering,
            cascade,
            bundle.bundle_id,
            loaded.recipe.teacher.price,
            health,
            self._replica,
        )
        # While it is the newest by this bundle: what it was tried on before is nothing it answered.
        member.tally = lambda: (
            measured.tally() if self._measured.get(bundle.bundle_id) is measured else Tally()
        )
        self._measured[bundle.bundle_id] = measured
        self._loaded[bundle.bundle_id] = loaded
        student.start()
        loop = asyncio.get_running_loop()
        running = [loop.create_task(work) for work in (measured.watch(), member.run())]
        if member.auditor:
            running.append(loop.create_task(member.work(member.auditor)))

        async def shadow(texts: Sequence[str]) -> None:
            measured.shadowed(await student.submit(texts))

        async def close() -> None:
            for task in running:
                task.cancel()
            if self._measured.get(bundle.bundle_id) is measured:
                del self._measured[bundle.bundle_id], self._loaded[bundle.bundle_id]
            await member.leave()
            measured.stopped()
            await student.close()
            if journal:
                await asyncio.to_thread(journal.close)
                if not journal.failure:
                    member.arrived()

        return Served(
            bundle=bundle,
            answering=measured,
            figures=measured.figures,
            decide=shadow,
            close=close,
            longest_s=settings.request_timeout_s + _LAST_AUDITS_S,
            unready=lambda: student.unready,
            tightened=lambda: rule.is_tightened,
        )


def _how_asked(loaded: Loaded) -> str | None:
    """Of classes, what a label dataset must have in common with this teacher to copy from it."""
    if not isinstance(loaded.bundle, PolicyBundle):
        return None
    identity = pipeline.identity(loaded.recipe, loaded.teacher, corpus_digest="")
    return taught.how_asked(loaded.recipe, identity)


_ROLL_S, _ROLL_TO_STORE_S = 300.0, 60.0  # by default, as the recipe says
_Unknown = Literal["unknown"]
_UNKNOWN: _Unknown = "unknown"


def _rule(loaded: Loaded, watch: Watch | _Unknown | None) -> Rule:
    """As the audits have left it."""
    rule = Rule(loaded)
    if watch == _UNKNOWN:
        rule.hold()
    elif isinstance(watch, Watch):
        rule.tighten(watch.threshold)
    return rule


def _watch(loaded: Loaded) -> Watch | _Unknown | None:
    """As the audits have left it, unknown where their store is away, None where none are made, or
    what a judge said that serving does not run; raises DataError if that is damaged."""
    feedback = loaded.recipe.cascade.feedback
    if not feedback or (loading.is_judged(loaded) and not judging.teacher_judges(loaded.recipe)):
        return None
    fresh = watching.watch_of(loaded.bundle)
    try:
        kept = watching.stored(Folder(feedback.to), loaded.bundle.bundle_id)
    except ClusterError:  # serving goes on by the teacher, and the figures say so
        return fresh and _UNKNOWN
    return kept.watch if kept else fresh


def _journal(settings: Feedback) -> Journal:
    folder = Folder(settings.to)
    roll_s = _ROLL_S if folder.directory is not None else _ROLL_TO_STORE_S
    return Journal(_spool(settings), folder.put, settings.roll_rows, settings.roll_s or roll_s)


def _spool(settings: Feedback) -> Path:
    """It lies where the files go, if that is a local folder, else with this machine's temporary
    files, which are lost with it."""
    temporary = Path(tempfile.gettempdir()) / f"feedback-{digest(settings.to)}"
    return Folder(settings.to).directory or temporary
