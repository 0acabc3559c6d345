"""The deployment of students that write, or that score on a GPU."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.answering import Said
from journeyman.certify.bundle import WrittenBundle
from journeyman.errors import JourneymanError
from serve import loading
from serve.apart import Standing
from serve.loading import Loaded
from serve.scaling import BUSY, Busy
from serve.scorers import Scorer
from serve.students import Behind
from serve.teacher import Unavailable, this_replica
from serve.writers import StudentEngine

INGRESS = "Cascade"  # the name of its deployment
_log = logging.getLogger("ray.serve")
_KEPT_S = 30.0  # after it was last asked for
_ANSWER_S = 10.0
_STARTING = "the student is starting"


def answering_now(own: str) -> Loaded | None:
    """What the ingress answers by, of the application whose own bundle that is; None where there is
    none yet, or no answer.

    Asked in a thread, since a replica is made in the event loop of its calls.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_ask_ingress, own).result()


def _ask_ingress(own: str) -> Loaded | None:
    name = serve.get_replica_context().app_name
    try:
        application = serve.status().applications.get(name)
        ingress = application and application.deployments.get(INGRESS)
        if not ingress or not ingress.replica_states.get("RUNNING"):
            return None  # the application is new, and nobody has exchanged its bundle
        asked = serve.get_deployment_handle(INGRESS, name).answering_now.remote(own)
        loaded: Loaded | None = asked.result(timeout_s=_ANSWER_S)
        return loaded
    except (RayError, RayServeException, TimeoutError) as error:
        _log.warning("the ingress does not say which bundle answers: %s", type(error).__name__)
        return None


class Student:
    """The deployment."""

    def __init__(
        self,
        loaded: Loaded,
        start: Callable[[Loaded], Any] | None = None,
        current: Callable[[str], Loaded | None] = answering_now,
    ) -> None:
        """Starts the student of the bundle that answers; raises ModelError, RecipeError,
        BundleMismatch.

        loaded: the application's own bundle, of a replica that learns of no other; start: another
        engine than a StudentEngine or a Scorer; current: another way to learn which bundle answers.
        """
        self._busy = Busy()
        self._place = loaded.recipe.cascade  # of this replica, whichever bundle answers
        loaded = current(loaded.bundle.bundle_id) or loaded
        first, now = loading.student_key(loaded.bundle), time.monotonic()
        self._start = start or self._own
        self._engines: dict[str, Any] = {first: self._start(loaded)}
        self._asked_at = {first: now}
        self._answers_at = {first: now}  # when it was last asked for as the one that answers
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[str, float]] = {}  # and when
        self._closing: set[asyncio.Task[None]] = set()

    async def label(
        self, texts: Sequence[str], student: str, avoid: Sequence[str] = ()
    ) -> list[Said] | Unavailable:
        """Its answers, one for each text; stops when the call is cancelled. avoid: for the
        router."""
        engine = self._engines.get(student)
        return await engine.label(texts) if engine else self._absent(student)

    async def score(
        self, texts: Sequence[str], student: str, stage: int, avoid: Sequence[str] = ()
    ) -> np.ndarray | Behind | Unavailable:
        """float32[n, c], logits of one of a bundle's students in turn, by its place; stops when the
        call is cancelled. avoid: for the router."""
        scorer = self._engines.get(student)
        return await scorer.score(texts, stage) if scorer else self._absent(student)

    async def unready(self, student: str, avoid: Sequence[str] = ()) -> Unavailable | None:
        """Why it cannot answer here, None if it can. avoid: for the router."""
        engine = self._engines.get(student)
        return await engine.unready() if engine else self._absent(student)

    async def keep(self, loaded: Loaded, answers: bool) -> Standing:
        """Have its student here, for a while from now on. answers: its bundle does, or else it is
        tried, or awaited."""
        student, now = loading.student_key(loaded.bundle), time.monotonic()
        self._asked_at[student] = now
        if answers:
            self._answers_at[student] = now
        self._close_forgotten(now)
        if student in self._engines:
            return Standing(ready=await self._engines[student].unready() is None)
        failure, at = self._failures.get(student, (None, 0.0))
        if failure and now - at < _KEPT_S:
            return Standing(ready=False, failure=failure)
        if student not in self._starting:
            # Serve ends the tasks of a call with it: in a context of its own this one lives on.
            self._starting[student] = contextvars.Context().run(
                asyncio.get_running_loop().create_task, self._started(student, loaded)
            )
        return Standing(ready=False)

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this three times: for the student that
        answers. One that is only tried is closed where it cannot start again."""
        for student, engine in list(self._engines.items()):
            try:
                await engine.check_health()
            except RuntimeError as error:
                if self._answers(student):
                    raise
                _log.error("a student that is tried is left out: %s", error)
                self._failures[student] = str(error), time.monotonic()
                self._close(student)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks for this where it scales students that score; see ``scaling``."""
        return {BUSY: self._busy.share()}

    def _own(self, loaded: Loaded) -> StudentEngine | Scorer:
        if isinstance(loaded.bundle, WrittenBundle):
            return StudentEngine(loaded)
        return Scorer(loaded, self._place, self._busy.worked)

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        for engine in getattr(self, "_engines", {}).values():
            engine.stop()

    def _answers(self, student: str) -> bool:
        """Nobody has asked for it as one that is tried, long after it last was one that answers."""
        return self._asked_at[student] - self._answers_at.get(student, -math.inf) <= _KEPT_S

    def _absent(self, student: str) -> Unavailable:
        failure, _ = self._failures.get(student, (None, 0.0))
        reason = failure if failure and student not in self._starting else _STARTING
        return Unavailable(reason=reason, replica=this_replica())

    async def _started(self, student: str, loaded: Loaded) -> None:
        try:
            self._engines[student] = await asyncio.to_thread(self._start, loaded)
        except JourneymanError as error:
            self._failures[student] = str(error), time.monotonic()
        except Exception as error:  # the one that answers must outlive any other
            self._failures[student] = f"{type(error).__name__}: {error}", time.monotonic()
        finally:
            del self._starting[student]

    def _close_forgotten(self, now: float) -> None:
        for student in [s for s in self._engines if now - self._asked_at[s] > _KEPT_S]:
            self._close(student)

    def _close(self, student: str) -> None:
        """In the background: an engine that is starting again ends only then."""
        work = self._engines.pop(student).close()
        task = contextvars.Context().run(asyncio.get_running_loop().create_task, work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
