"""The ingress deployment: HTTP, the policy, and the student, an encoder on this replica's CPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.answering import Cascade, Unlabeled
from journeyman.cascade.batcher import Batcher
from journeyman.cascade.policy import Decision, Escalation, Policy
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.certify.bundle import PolicyBundle
from journeyman.errors import BundleMismatch
from journeyman.models import Model
from journeyman.recipe import Cascade as CascadeSettings
from journeyman.student.models import Classifier
from journeyman.teacher.answers import ClassLabels
from serve.http import api
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
_STARTING = "the teacher is starting"
_GONE = "the teacher's replica is gone and another is starting"


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """All that an ingress replica needs to begin; travels to its actor."""

    bundle: PolicyBundle
    student: Model
    settings: CascadeSettings


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
        student = Classifier.load(spec.student.path, threads=STUDENT_CPUS)
        if student.labels != spec.bundle.label_names:
            raise BundleMismatch(
                f"{spec.student.path} answers with the labels {', '.join(student.labels)}, the "
                f"bundle with {', '.join(spec.bundle.label_names)}. Run `journeyman certify`."
            )
        policy = Policy.from_bundle(spec.bundle)
        batch_size = spec.settings.max_batch_size

        def decide(texts: Sequence[str]) -> list[Decision | Escalation]:
            return policy.decide_batch(student.logits(texts, _ROWS_A_PASS))

        self._student = Batcher(decide, batch_size)
        self._teacher = TeacherByHandle(teacher)
        self._cascade = Cascade(
            policy,
            self._student,
            self._teacher,
            max_waiting=spec.settings.max_queued_requests,
            timeout_s=spec.settings.request_timeout_s,
        )
        self._student.start()
        self._watching = asyncio.get_running_loop().create_task(self._teacher.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the replica is made."""
        return api(self._cascade, self._spec.bundle, lambda: self._teacher.unready)


def _unavailable(reason: str) -> TeacherUnavailable:
    return TeacherUnavailable(
        f"{reason}; texts that the student may answer are answered meanwhile. Send this request "
        "again in some seconds."
    )
