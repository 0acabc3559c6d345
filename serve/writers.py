"""Students that write: their deployment, and how the ingress asks it.

A replica has an engine for each student that is asked for. Whoever answers by a bundle asks every
replica for its student again and again (``keep``); an engine that nobody has asked for in a while
is closed. So a new bundle's student starts beside the one that answers, replicas that Serve starts
later learn of it, and the old one ends after its last request.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman import models
from journeyman.cascade.answering import Said
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.cascade.refusals import StudentUnavailable, TeacherUnavailable
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify import written
from journeyman.errors import JourneymanError, ModelError
from journeyman.student import writing
from serve import loading
from serve.asking import TeacherByHandle
from serve.loading import Loaded
from serve.students import Rule
from serve.teacher import Teacher, Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Of a student in one replica."""

    ready: bool
    failure: str | None = None  # why it did not start


class Student:
    """The deployment."""

    def __init__(self, loaded: Loaded, start: Callable[[Loaded], Teacher] = StudentEngine) -> None:
        """Starts its engine; raises ModelError, RecipeError, BundleMismatch. start: another."""
        first = loading.student_key(loaded.bundle)
        self._start = start
        self._engines = {first: start(loaded)}
        self._asked_at = {first: time.monotonic()}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[str, float]] = {}  # and when

    async def label(self, texts: Sequence[str], student: str) -> list[Said] | Unavailable:
        """Its answers, one for each text; stops when the call is cancelled."""
        engine = self._engines.get(student)
        return await engine.label(texts) if engine else Unavailable(reason=_STARTING)

    async def unready(self, student: str) -> str | None:
        """Why it cannot answer here, None if it can."""
        engine = self._engines.get(student)
        return await engine.unready() if engine else _STARTING

    async def keep(self, loaded: Loaded) -> Standing:
        """Have its student here, for a while from now on."""
        student, now = loading.student_key(loaded.bundle), time.monotonic()
        self._asked_at[student] = now
        await self._close_forgotten(now)
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
        """For Serve, which replaces a replica that fails this three times."""
        for engine in self._engines.values():
            await engine.check_health()

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        for engine in getattr(self, "_engines", {}).values():
            engine.stop()

    async def _started(self, student: str, loaded: Loaded) -> None:
        try:
            self._engines[student] = await asyncio.to_thread(self._start, loaded)
        except JourneymanError as error:
            self._failures[student] = str(error), time.monotonic()
        except Exception as error:  # the one that answers must outlive any other
            self._failures[student] = f"{type(error).__name__}: {error}", time.monotonic()
        finally:
            del self._starting[student]

    async def _close_forgotten(self, now: float) -> None:
        forgotten = [s for s in self._engines if now - self._asked_at[s] > _KEPT_S]
        for student in forgotten:
            await self._engines.pop(student).close()


class Writer:
    """A student behind the policy; its engine batches by itself."""

    def __init__(
        self, handle: DeploymentHandle, loaded: Loaded, rule: Rule, is_up: bool = False
    ) -> None:
        """is_up: as ``started`` has seen, so that no request need wait for a probe."""
        student = loading.student_key(loaded.bundle)
        self._engine = TeacherByHandle(handle, whose="student", which=(student,))
        if is_up:
            self._engine.unready = None
        self._handle, self._loaded, self._rule = handle, loaded, rule
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
        return policy.decide_batch([one if isinstance(one, Written) else None for one in said])

    async def _keep(self) -> None:
        while True:
            await _kept(self._handle, self._loaded)
            await asyncio.sleep(_ASK_EVERY_S)


async def started(handle: DeploymentHandle, loaded: Loaded) -> None:
    """Once every replica has the bundle's student; raises ModelError where one cannot."""
    within_s = loaded.recipe.teacher.start_timeout_s + _OTHER_WORK_S
    deadline = time.monotonic() + within_s
    while True:
        standings = await _kept(handle, loaded)
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


async def _kept(handle: DeploymentHandle, loaded: Loaded) -> list[Standing]:
    """In each replica; nothing where they cannot be asked now."""
    try:
        asked = handle.broadcast("keep", loaded)
        standings: list[Standing] = await asked.results_async(timeout_s=_ANSWER_S)
        return standings
    except (RayError, RayServeException, TimeoutError):
        return []
