"""The ingress deployment: HTTP, the policy, and the student, an encoder on this replica's CPUs."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.answering import Cascade, Unlabeled
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.feedback import Journal
from journeyman.cascade.keys import Key, Keyring
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.recording import Answering, Recording
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.cascade.remembering import Remembering
from journeyman.columns import unpacked
from journeyman.errors import BundleMismatch
from journeyman.labels.folder import Folder
from journeyman.recipe import Feedback, digest
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from journeyman.teacher.answers import ClassLabels
from serve import loading
from serve.http import api
from serve.live import Live, Served
from serve.loading import Loaded
from serve.metrics import Measured
from serve.teacher import Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# Of a replica, for the student, and as many threads. More would be faster beside an idle teacher
# (378 against 247 rows/s on two cores), but beside a busy one on the same cores each waits for the
# other to be scheduled: 20 requests/s against 157.
STUDENT_CPUS = 1

# Of a batch, sorted by length, for one forward pass: 32 texts hold all lengths, and short passes
# pad less (279 against 206 rows/s with 8 in place of 32, on one thread).
_ROWS_A_PASS = 8

_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 5.0  # of a busy machine
_BACK_IN_S = 5.0  # no better is known of an engine that starts
_STARTING = "the teacher is starting"
_GONE = "the teacher's replica is gone and another is starting"


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """All that an ingress replica needs to begin; travels to its actor."""

    loaded: Loaded
    keys: tuple[Key, ...] = ()  # nobody needs one where there is none


class TeacherByHandle:
    """The teacher as the cascade sees it. Knows from a probe whether it may be asked at all:
    a call to a deployment without a replica would wait for one until its deadline."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self.unready: str | None = _STARTING

    async def labels(self, texts: Sequence[str]) -> Sequence[ClassLabels | Unlabeled]:
        """Raises TeacherUnavailable."""
        if self.unready:
            raise _unavailable(self.unready)
        response = self._handle.label.remote(list(texts))
        try:
            reply = await response
        except asyncio.CancelledError:
            # Serve cancels the call for a client that goes away, but not for a deadline of ours.
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            self.unready = _GONE
            raise _unavailable(_GONE) from error
        if isinstance(reply, Unavailable):
            self.unready = reply.reason
            raise _unavailable(reply.reason)
        return reply

    async def watch(self) -> None:
        """Keep ``unready`` true, as long as the replica lives."""
        while True:
            await self._probe()
            await asyncio.sleep(_PROBE_INTERVAL_S)

    async def _probe(self) -> None:
        response = self._handle.unready.remote()
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                self.unready = await response
        except TimeoutError:
            response.cancel()
            self.unready = self.unready or "the teacher does not answer"
        except (RayError, RayServeException):
            self.unready = _GONE


class Ingress:
    """Serves a cascade over HTTP."""

    def __init__(self, spec: IngressSpec, teacher: DeploymentHandle) -> None:
        """Loads the student, in Serve's event loop; raises ModelError, BundleMismatch."""
        self._spec = spec
        self._teacher = TeacherByHandle(teacher)
        first = self._served(spec.loaded, _student(spec.loaded))
        timeout_s = spec.loaded.recipe.cascade.request_timeout_s
        self._live = Live(first, self._load, close_after_s=timeout_s)
        self._watching = asyncio.get_running_loop().create_task(self._teacher.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is made."""
        keyring = Keyring(self._spec.keys, time.monotonic) if self._spec.keys else None
        return api(self._live, lambda: self._teacher.unready, keyring)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this when ``user_config`` has changed; see ``live.UserConfig``."""
        self._live.follow(user_config)

    async def _load(self, bundle_dir: Path) -> Served:
        loaded = await asyncio.to_thread(loading.load, bundle_dir)
        loading.check_same_teacher(loaded.bundle, self._spec.loaded.bundle)
        return self._served(loaded, await asyncio.to_thread(_student, loaded))

    def _served(self, loaded: Loaded, student: Classifier) -> Served:
        """Everything that answers by one bundle, started."""
        bundle, settings = loaded.bundle, loaded.recipe.cascade
        policy, inputs = Policy.from_bundle(bundle), Inputs(loaded.recipe.learner())

        def decide(texts: Sequence[str]) -> list[Decision | Escalation]:
            rows = inputs.all(unpacked(text, bundle.columns) for text in texts)
            return policy.decide_batch(student.logits(rows, _ROWS_A_PASS))

        batcher = Batcher(decide, settings.max_batch_size)
        cascade = Cascade(policy, batcher, self._teacher, settings)
        journal = _journal(settings.feedback) if settings.feedback else None
        answering: Answering = cascade
        if settings.remembered_texts:
            answering = Remembering(cascade, settings.remembered_texts)
        if journal and settings.feedback:
            rate = settings.feedback.audit_rate
            answering = Recording(answering, journal, rate, bundle.bundle_id)
        measured = Measured(answering, cascade, bundle.bundle_id, loaded.recipe.teacher.price)
        batcher.start()
        watching = asyncio.get_running_loop().create_task(measured.watch())

        async def shadow(texts: Sequence[str]) -> None:
            measured.shadowed(await batcher.submit(texts))

        async def close() -> None:
            watching.cancel()
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


def _student(loaded: Loaded) -> Classifier:
    """Raises ModelError, BundleMismatch."""
    student = Classifier.load(loaded.student.path, threads=STUDENT_CPUS)
    if student.labels != loaded.bundle.label_names:
        raise BundleMismatch(
            f"{loaded.student.path} answers with the labels {', '.join(student.labels)}, the "
            f"bundle with {', '.join(loaded.bundle.label_names)}. Run `journeyman certify`."
        )
    return student


def _unavailable(reason: str) -> TeacherUnavailable:
    return TeacherUnavailable(
        f"{reason}; texts that the student may answer are answered meanwhile. Send this request "
        "again in some seconds.",
        _BACK_IN_S,
    )


def _journal(settings: Feedback) -> Journal:
    """The spool lies where the files go, if that is a local folder, else with this machine's
    temporary files."""
    folder = Folder(settings.to)
    spool = folder.directory or Path(tempfile.gettempdir()) / f"feedback-{digest(settings.to)}"
    return Journal(spool, folder.put, settings.roll_rows, settings.roll_s)
