"""The teacher's deployment as the cascade asks it: by handle, and never one that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from journeyman.cascade.answering import Hear, Said
from journeyman.cascade.refusals import TeacherAway, TeacherStarting, TeacherUnavailable
from serve.teacher import SoFar, Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 5.0  # of a busy machine
_BACK_IN_S = 5.0  # no better is known of an engine that starts


class TeacherByHandle:
    """The teacher, or a student that writes, as the cascade sees it. Knows whether it may be asked
    at all: a call to a deployment without a replica would wait for one until its deadline.

    One that may sleep is not probed, since each probe would keep it awake: whether a replica runs
    is what the others say, and a call that is left at the handle wakes it.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        may_sleep: bool = False,
        whose: str = "teacher",
        which: tuple[str, ...] = (),
    ) -> None:
        """whose: its name in sentences; which: of several models behind the handle."""
        self._handle, self._which = handle, which
        self._may_sleep = may_sleep
        self._waking: asyncio.Task[None] | None = None
        self._started_in_s = _BACK_IN_S  # how long it took the last time
        self.n_running = 0
        self._whose = whose
        self._starting = f"the {whose} is starting"
        self._gone = f"the {whose}'s replica is gone and another is starting"
        self.unready: str | None = None if may_sleep else self._starting

    @property
    def asleep(self) -> bool:
        return self._may_sleep and self.n_running == 0

    def count(self, n_running: int) -> None:
        self.n_running = n_running

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> Sequence[Said]:
        """Raises TeacherUnavailable. hear: told of the one text's answer as it grows."""
        if self.asleep:
            self._wake()
            raise TeacherStarting(_words(self._starting), self._started_in_s)
        if self.unready:
            raise TeacherAway(_words(self.unready), _BACK_IN_S)
        try:
            reply = await (self._written(texts, hear) if hear else self._labeled(texts))
        except RayTaskError as error:  # of this request alone, for all anyone knows
            raise _unavailable(f"the {self._whose} failed on this request") from error
        except (RayError, RayServeException) as error:
            self._know(self._gone)
            raise _unavailable(self._gone) from error
        if isinstance(reply, Unavailable):
            self._know(reply.reason)
            raise _unavailable(reply.reason)
        return reply

    async def _labeled(self, texts: Sequence[str]) -> Sequence[Said] | Unavailable:
        response = self._handle.label.remote(list(texts), *self._which)
        with _cancelled(response):
            reply: Sequence[Said] | Unavailable = await response
            return reply

    async def _written(self, texts: Sequence[str], hear: Hear) -> Sequence[Said] | Unavailable:
        [text] = texts
        response = self._handle.options(stream=True).speak.remote(text, *self._which)
        said: Said | Unavailable = Unavailable(reason=self._gone)
        with _cancelled(response):
            async for part in response:
                if isinstance(part, SoFar):
                    hear(part.written)
                else:
                    said = part
        return said if isinstance(said, Unavailable) else [said]

    async def watch(self) -> None:
        """Keep ``unready`` true, as long as the replica lives."""
        while not self._may_sleep:
            await self._probe()
            await asyncio.sleep(_PROBE_INTERVAL_S)

    def _know(self, reason: str) -> None:
        if not self._may_sleep:  # else nobody would ever know better
            self.unready = reason

    def _wake(self) -> None:
        if self._waking is None or self._waking.done():
            # Serve ends the tasks of a request with it: in a context of its own this one lives on.
            self._waking = contextvars.Context().run(
                asyncio.get_running_loop().create_task, self._woken()
            )

    async def _woken(self) -> None:
        since = time.monotonic()
        with contextlib.suppress(RayError, RayServeException):
            await self._handle.unready.remote(*self._which)
            self.n_running = 1
            self._started_in_s = time.monotonic() - since

    async def _probe(self) -> None:
        response = self._handle.unready.remote(*self._which)
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                self.unready = await response
        except TimeoutError:
            response.cancel()
            self.unready = self.unready or f"the {self._whose} does not answer"
        except (RayError, RayServeException):
            self.unready = self._gone


@contextlib.contextmanager
def _cancelled(response: Any) -> Iterator[None]:
    """With whom it is asked for: Serve cancels a call for a client that goes away, but not for a
    deadline of ours."""
    try:
        yield
    except asyncio.CancelledError:
        response.cancel()
        raise


def _unavailable(reason: str) -> TeacherUnavailable:
    return TeacherUnavailable(_words(reason), _BACK_IN_S)


def _words(reason: str) -> str:
    return (
        f"{reason}; texts that the student may answer are answered meanwhile. Send this request "
        "again in some seconds."
    )
