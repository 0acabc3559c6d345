"""The ingress deployment: HTTP, the policy, and the student, an encoder on this replica's CPUs."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI

from journeyman.cascade import watching
from journeyman.cascade.answering import Cascade
from journeyman.cascade.auditing import Auditor
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.budgets import Purse
from journeyman.cascade.drift import Watch
from journeyman.cascade.feedback import Journal
from journeyman.cascade.keys import Key, Keyring
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.recording import Answering, Recording
from journeyman.cascade.remembering import Remembering
from journeyman.cascade.stability import Stability
from journeyman.certify.thresholds import ESCALATE_EVERYTHING
from journeyman.columns import unpacked
from journeyman.errors import BundleMismatch, ClusterError
from journeyman.folder import Folder
from journeyman.recipe import Feedback, digest
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from serve import loading
from serve.agreement import Agreed, Member
from serve.asking import TeacherByHandle
from serve.billing import settle
from serve.http import api
from serve.live import Live, Served
from serve.loading import Loaded
from serve.metrics import Health, Measured
from serve.scaling import BUSY

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# Of a replica, for the student, and as many threads. More would be faster beside an idle teacher
# (378 against 247 rows/s on two cores), but beside a busy one on the same cores each waits for the
# other to be scheduled: 20 requests/s against 157.
STUDENT_CPUS = 1

# Of a batch, sorted by length, for one forward pass: 32 texts hold all lengths, and short passes
# pad less (279 against 206 rows/s with 8 in place of 32, on one thread).
_ROWS_A_PASS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """All that an ingress replica needs to begin; travels to its actor."""

    loaded: Loaded
    keys: tuple[Key, ...] = ()  # nobody needs one where there is none


class Ingress:
    """Serves a cascade over HTTP."""

    def __init__(
        self, spec: IngressSpec, teacher: DeploymentHandle, agreement: DeploymentHandle
    ) -> None:
        """Loads the student, in Serve's event loop; raises ModelError, BundleMismatch."""
        self._spec = spec
        self._agreement = agreement
        self._replica = uuid.uuid4().hex
        self._busy_s, self._reported_at = 0.0, time.monotonic()
        may_sleep = spec.loaded.recipe.cascade.teacher_replicas.min == 0
        self._teacher = TeacherByHandle(teacher, may_sleep)
        limits = {k.sha256: k.dollars_per_day for k in spec.keys if k.dollars_per_day is not None}
        self._purse = Purse(limits)
        self._keyring = Keyring(spec.keys, time.monotonic)
        first = self._served(spec.loaded, _student(spec.loaded), _watch(spec.loaded))
        timeout_s = spec.loaded.recipe.cascade.request_timeout_s
        self._live = Live(first, self._load, close_after_s=timeout_s)
        state = spec.loaded.recipe.cascade.state
        if limits and state:
            ask = agreement.settle.remote
            self._settling = asyncio.get_running_loop().create_task(
                settle(self._purse, self._replica, state, ask)
            )
        self._watching = asyncio.get_running_loop().create_task(self._teacher.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is made."""
        keyring = self._keyring if self._spec.keys else None
        return api(self._live, lambda: self._teacher.unready, keyring, self._purse)

    async def __del__(self) -> None:
        """Serve calls this when the replica stops: what is kept becomes files at once."""
        if hasattr(self, "_live"):
            await self._live.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this when ``user_config`` has changed; see ``live.UserConfig``."""
        self._live.follow(user_config)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for this where it scales the ingress; see ``scaling``."""
        now = time.monotonic()
        busy = self._busy_s / max(now - self._reported_at, 1e-9)
        self._busy_s, self._reported_at = 0.0, now
        return {BUSY: min(1.0, busy)}

    def _worked(self, seconds: float) -> None:
        self._busy_s += seconds

    async def _load(self, bundle: str) -> Served:
        loaded = await asyncio.to_thread(loading.load, bundle)
        loading.check_same_teacher(loaded.bundle, self._spec.loaded.bundle)
        student, watch = await asyncio.to_thread(lambda: (_student(loaded), _watch(loaded)))
        return self._served(loaded, student, watch)

    def _heard(self, agreed: Agreed) -> None:
        self._teacher.count(agreed.n_teachers)
        self._keyring.share(agreed.n_replicas)

    def _served(
        self, loaded: Loaded, student: Classifier, watch: Watch | _Unknown | None
    ) -> Served:
        """Everything that answers by one bundle, started."""
        bundle, settings = loaded.bundle, loaded.recipe.cascade
        rule = _Rule(loaded, student)
        if watch == _UNKNOWN:
            rule.hold()
        elif isinstance(watch, Watch):
            rule.tighten(watch.threshold)
        batcher = Batcher(rule.decide, settings.max_batch_size, self._worked)
        cascade = Cascade(rule.policy, batcher, self._teacher, settings)
        answering: Answering = cascade
        if settings.remembered_texts:
            answering = remembering = Remembering(cascade, settings.remembered_texts)
            rule.when_changed = remembering.forget
        journal, auditor = None, None
        if kept := settings.feedback:
            journal = _journal(kept)
            auditor = Auditor(
                rule.policy,
                cascade,
                busy=lambda: cascade.waiting.n_waiting > 0 or self._teacher.asleep,
            )
            answering = Recording(
                answering, journal, kept.audit_rate, bundle.bundle_id, auditor=auditor
            )
        member = Member(
            replica=self._replica,
            bundle=bundle.bundle_id,
            fresh=watching.watch_of(bundle) if watch == _UNKNOWN else watch,
            feedback=kept.to if kept else None,
            breaker=cascade.breaker,
            auditor=auditor,
            tighten=rule.tighten,
            ask=self._agreement.exchange.remote,
            heard=self._heard,
        )
        health = Health(member, self._purse, Stability(bundle.curve, bundle.served.n), journal)
        measured = Measured(
            answering, cascade, bundle.bundle_id, loaded.recipe.teacher.price, health
        )
        batcher.start()
        loop = asyncio.get_running_loop()
        running = [loop.create_task(work) for work in (measured.watch(), member.run())]
        if auditor:
            running.append(loop.create_task(auditor.run()))

        async def shadow(texts: Sequence[str]) -> None:
            measured.shadowed(await batcher.submit(texts))

        async def close() -> None:
            for task in running:
                task.cancel()
            await member.leave()
            await batcher.close()
            if journal:
                await asyncio.to_thread(journal.close)

        return Served(
            bundle=bundle,
            answering=measured,
            figures=measured.figures,
            decide=shadow,
            close=close,
        )


class _Rule:
    """A bundle's policy over its student, as strict as the audits have made it."""

    def __init__(self, loaded: Loaded, student: Classifier) -> None:
        self.policy = Policy.from_bundle(loaded.bundle)
        self.when_changed: Callable[[], None] = lambda: None
        self._held: Policy | None = None
        self._columns = loaded.bundle.columns
        self._inputs = Inputs(loaded.recipe.learner())
        self._student = student

    def decide(self, texts: Sequence[str]) -> list[Decision | Escalation]:
        rows = self._inputs.all(unpacked(text, self._columns) for text in texts)
        return self.policy.decide_batch(self._student.logits(rows, _ROWS_A_PASS))

    def hold(self) -> None:
        """Answer nothing until it is known how strict the audits have made the rule."""
        self._held = self.policy
        self.policy = self.policy.tightened(ESCALATE_EVERYTHING)

    def tighten(self, accept_above: float) -> None:
        changed = self._held is not None
        if self._held is not None:
            self.policy, self._held = self._held, None
        if accept_above > self.policy.accept_above:
            self.policy = self.policy.tightened(accept_above)
            changed = True
        if changed:
            self.when_changed()


_Unknown = Literal["unknown"]
_UNKNOWN: _Unknown = "unknown"


def _student(loaded: Loaded) -> Classifier:
    """Raises ModelError, BundleMismatch."""
    student = Classifier.load(loading.student_here(loaded), threads=STUDENT_CPUS)
    if student.labels != loaded.bundle.label_names:
        raise BundleMismatch(
            f"{loaded.student.path} answers with the labels {', '.join(student.labels)}, the "
            f"bundle with {', '.join(loaded.bundle.label_names)}. Run `journeyman certify`."
        )
    return student


def _watch(loaded: Loaded) -> Watch | _Unknown | None:
    """As the audits have left it, unknown where their store is away, None where none are made;
    raises DataError if that is damaged."""
    feedback = loaded.recipe.cascade.feedback
    if not feedback:
        return None
    fresh = watching.watch_of(loaded.bundle)
    try:
        found = watching.stored(Folder(feedback.to), loaded.bundle.bundle_id)
    except ClusterError:  # serving goes on by the teacher, and the figures say so
        return fresh and _UNKNOWN
    return found or fresh


def _journal(settings: Feedback) -> Journal:
    """The spool lies where the files go, if that is a local folder, else with this machine's
    temporary files."""
    folder = Folder(settings.to)
    spool = folder.directory or Path(tempfile.gettempdir()) / f"feedback-{digest(settings.to)}"
    return Journal(spool, folder.put, settings.roll_rows, settings.roll_s)
