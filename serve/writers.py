"""Students that write: their deployment, and how the ingress asks it.

A replica has an engine for each student that is asked for. Whoever answers by a bundle asks every
replica for its student again and again (``keep``); an engine that nobody has asked for in a while
is closed. So a new bundle's student starts beside the one that answers, replicas that Serve starts
later learn of it, and the old one ends after its last request.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman import models
from journeyman.cascade.answering import Said
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.cascade.refusals import StudentUnavailable, TeacherUnavailable
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import consistency, written
from journeyman.certify.bundle import WrittenBundle
from journeyman.columns import unpacked
from journeyman.errors import JourneymanError, ModelError
from journeyman.student import writing
from journeyman.teacher import tasks
from journeyman.teacher.answers import RationaleLabels, RowError
from serve import loading
from serve.asking import TeacherByHandle
from serve.loading import Loaded
from serve.students import Rule
from serve.teacher import Teacher, Unavailable, this_replica

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

INGRESS = "Cascade"  # the name of its deployment
_log = logging.getLogger("ray.serve")
_ASK_EVERY_S = 5.0
_KEPT_S = 30.0  # after it was last asked for
_LOOK_EVERY_S = 1.0  # whether one has started
_ANSWER_S = 10.0  # of all replicas
_STARTING = "the student is starting"
_OTHER_WORK_S = 60.0  # of a start, besides the engine's: to fetch and check the folder


class StudentEngine(Teacher):
    """One of them, asked as it was for its certificate."""

    whose = "student"

    def __init__(self, loaded: Loaded) -> None:
        """Starts the engine; raises ModelError, RecipeError, BundleMismatch."""
        folder = loading.student_here(loaded)
        asked = written.check(loaded.recipe)
        settings = writing.written_by(loaded.recipe, folder, asked).teacher
        super().__init__(settings, asked, loaded.bundle.columns, models.resolve(str(folder)))
        assert isinstance(loaded.bundle, WrittenBundle)
        drawn = loaded.bundle.samples
        self._samples = (
            tasks.local(consistency.question(asked, drawn), self._engine) if drawn else None
        )

    async def _label_one(self, text: str) -> Said:
        """With the samples that its confidence takes."""
        if self._samples is None:
            return await super()._label_one(text)
        said, drawn = await asyncio.gather(super()._label_one(text), self._drawn(text))
        return replace(said, samples=drawn) if isinstance(said, Written) else said

    async def _drawn(self, text: str) -> tuple[str, ...]:
        assert self._samples is not None
        try:
            labels = await self._samples.run(unpacked(text, self._columns))
        except RowError:  # none, as such a row has none in its certificate's dataset
            return ()
        assert isinstance(labels, RationaleLabels)
        return tuple(labels.reasonings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Of a student in one replica."""

    ready: bool
    failure: str | None = None  # why it did not start


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
        start: Callable[[Loaded], Teacher] = StudentEngine,
        current: Callable[[str], Loaded | None] = answering_now,
    ) -> None:
        """Starts the engine of the bundle that answers; raises ModelError, RecipeError,
        BundleMismatch.

        loaded: the application's own bundle, of a replica that learns of no other; start: another
        engine; current: another way to learn which bundle answers.
        """
        loaded = current(loaded.bundle.bundle_id) or loaded
        first, now = loading.student_key(loaded.bundle), time.monotonic()
        self._start = start
        self._engines = {first: start(loaded)}
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
        """For Serve, which replaces a replica that fails this three times: for the engine of the
        student that answers. One that is only tried is closed where it cannot start again."""
        for student, engine in list(self._engines.items()):
            try:
                await engine.check_health()
            except RuntimeError as error:
                if self._answers(student):
                    raise
                _log.error("a student that is tried is left out: %s", error)
                self._failures[student] = str(error), time.monotonic()
                self._close(student)

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


class Writer:
    """A student behind the policy; its engine batches by itself."""

    def __init__(
        self,
        handle: DeploymentHandle,
        loaded: Loaded,
        rule: Rule,
        answers: Callable[[], bool],
        is_up: bool = False,
    ) -> None:
        """answers: whether its bundle does now, or is tried; is_up: as ``started`` has seen, so
        that no request need wait for a probe."""
        student = loading.student_key(loaded.bundle)
        self._engine = TeacherByHandle(handle, whose="student", which=(student,))
        if is_up:
            self._engine.unready = None
        self._handle, self._loaded, self._rule, self._answers = handle, loaded, rule, answers
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._running = [loop.create_task(work) for work in (self._engine.watch(), self._keep())]

    async def close(self) -> None:
        """Its engine is closed when nobody else has asked for it in a while."""
        for task in self._running:
            task.cancel()

    @property
    def unready(self) -> str | None:
        return self._engine.unready

    @property
    def wait_s(self) -> float:
        """Unknown: an engine works on many at once, some of which take long."""
        return 0.0

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        """Raises StudentUnavailable."""
        try:
            said = await self._engine.labels(items)
        except TeacherUnavailable as refusal:
            raise StudentUnavailable(
                "the student is away (starting, most likely); ask for the cascade, whose teacher "
                "answers meanwhile, or again in some seconds.",
                refusal.retry_after_s,
            ) from refusal
        policy = self._rule.policy
        assert isinstance(policy, WrittenPolicy)
        answers = [one if isinstance(one, Written) else None for one in said]
        return self._rule.within(items, policy.decide_batch(answers))

    async def _keep(self) -> None:
        while True:
            await _kept(self._handle, self._loaded, self._answers())
            await asyncio.sleep(_ASK_EVERY_S)


async def started(handle: DeploymentHandle, loaded: Loaded) -> None:
    """Once every replica has the bundle's student; raises ModelError where one cannot."""
    within_s = loaded.recipe.teacher.start_timeout_s + _OTHER_WORK_S
    deadline = time.monotonic() + within_s
    while True:
        standings = await _kept(handle, loaded, answers=False)
        for standing in standings:
            if standing.failure:
                raise ModelError(
                    f"the student of bundle {loaded.bundle.bundle_id} does not start beside the "
                    f"one that answers, which goes on ({standing.failure}). Where there is no "
                    "room for two, deploy it anew: name it as the application's bundle."
                )
        if standings and all(standing.ready for standing in standings):
            return
        if time.monotonic() > deadline:
            raise ModelError(
                f"the student of bundle {loaded.bundle.bundle_id} has not started within "
                f"{within_s:g} s (teacher.start_timeout_s); the one before goes on. Look at "
                "Serve's log files of the deployment Student."
            )
        await asyncio.sleep(_LOOK_EVERY_S)


async def _kept(handle: DeploymentHandle, loaded: Loaded, answers: bool) -> list[Standing]:
    """In each replica; nothing where they cannot be asked now."""
    try:
        asked = handle.broadcast("keep", loaded, answers)
        standings: list[Standing] = await asked.results_async(timeout_s=_ANSWER_S)
        return standings
    except (RayError, RayServeException, TimeoutError):
        return []
