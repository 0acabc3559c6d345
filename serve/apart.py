"""A student in a deployment of its own, as the ingress asks it.

A replica holds each student that is asked for. Whoever answers by a bundle asks every replica for
its student again and again (``keep``); one that nobody has asked for in a while is closed. So a new
bundle's student starts beside the one that answers, replicas that Serve starts later learn of it,
and the old one ends after its last request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.refusals import StudentUnavailable, TeacherUnavailable
from journeyman.errors import ModelError
from serve import loading
from serve.asking import TeacherByHandle
from serve.loading import Loaded
from serve.students import Rule

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")
_ASK_EVERY_S = 5.0
_LOOK_EVERY_S = 1.0  # whether one has started
_ANSWER_S = 10.0  # of all replicas
_OTHER_WORK_S = 60.0  # of a start, besides the engine's: to fetch and check the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Of a student in one replica."""

    ready: bool
    failure: str | None = None  # why it did not start


class Apart:
    """What students that write and those that score have in common."""

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
        """It is closed when nobody else has asked for it in a while."""
        for task in self._running:
            task.cancel()

    @property
    def unready(self) -> str | None:
        return self._engine.unready

    @property
    def wait_s(self) -> float:
        """Unknown: replicas are shared, and an engine works on many at once."""
        return 0.0

    @staticmethod
    async def _there(said: Awaitable[T]) -> T:
        """Raises StudentUnavailable."""
        try:
            return await said
        except TeacherUnavailable as refusal:
            raise StudentUnavailable(
                "the student is away (starting, most likely); ask for the cascade, whose teacher "
                "answers meanwhile, or again in some seconds.",
                refusal.retry_after_s,
            ) from refusal

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
