"""The teacher's deployment as the cascade asks it: by handle, and never one that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from journeyman.cascade.answering import Hear, Said
from journeyman.cascade.refusals import TeacherAway, TeacherStarting, TeacherUnavailable
from journeyman.teacher.progress import Spent
from serve.accounts import Account, account
from serve.growth import More, Whole
from serve.teacher import Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 5.0  # of a busy machine
_BACK_IN_S = 5.0  # no better is known of an engine that starts
# What was done for calls that were given up is asked for every second, until every replica has long
# heard that the last of them is.
_COME_EVERY_S = 1.0
_HEARD_WITHIN_S = 5.0
_COME_TIMEOUT_S = 10.0


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
        bill: Callable[[Account, Spent], None] | None = None,
    ) -> None:
        """whose: its name in sentences; which: of several models behind the handle; bill: told
        what was done for requests that were given up, None where nobody pays."""
        self._handle, self._which = handle, which
        self._bill = bill
        self._given_up_at = 0.0  # the last call
        self._coming: asyncio.Task[None] | None = None
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
        response = self._handle.label.remote(list(texts), *self._named)
        with self._cancelled(response):
            reply: Sequence[Said] | Unavailable = await response
            return reply

    async def _written(self, texts: Sequence[str], hear: Hear) -> Sequence[Said] | Unavailable:
        [text] = texts
        response = self._handle.options(stream=True).speak.remote(text, *self._named)
        said: Said | Unavailable = Unavailable(reason=self._gone)
        so_far = Whole()
        with self._cancelled(response):
            async for part in response:
                if isinstance(part, More):
                    hear(so_far.add(part))
                else:
                    said = part
        return said if isinstance(said, Unavailable) else [said]

    @property
    def _named(self) -> tuple[Any, ...]:
        """Behind the texts of a call."""
        whose = account.get()
        return self._which or ((whose,) if whose else ())

    @contextlib.contextmanager
    def _cancelled(self, response: Any) -> Iterator[None]:
        """With whom it is asked for: Serve cancels a call for a client that goes away, but not for
        a deadline of ours."""
        try:
            yield
        except (asyncio.CancelledError, RequestCancelledError):  # by us, or by Serve before
            response.cancel()
            if self._bill and (whose := account.get()):
                self._come_for_given_up(whose.ingress, self._bill)
            raise

    def _come_for_given_up(self, ingress: str, bill: Callable[[Account, Spent], None]) -> None:
        self._given_up_at = time.monotonic()
        if self._coming is None or self._coming.done():
            # Serve ends the tasks of a request with it: in a context of its own this one lives on.
            self._coming = contextvars.Context().run(
                asyncio.get_running_loop().create_task, self._came(ingress, bill)
            )

    async def _came(self, ingress: str, bill: Callable[[Account, Spent], None]) -> None:
        asked_at = self._given_up_at
        while asked_at < self._given_up_at + _HEARD_WITHIN_S:
            await asyncio.sleep(_COME_EVERY_S)
            asked_at = time.monotonic()
            with contextlib.suppress(RayError, RayServeException, TimeoutError):
                asked = self._handle.broadcast("given_up", ingress)
                for found in await asked.results_async(timeout_s=_COME_TIMEOUT_S):
                    for whose, spent in found.items():
                        bill(whose, spent)

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


def _unavailable(reason: str) -> TeacherUnavailable:
    return TeacherUnavailable(_words(reason), _BACK_IN_S)


def _words(reason: str) -> str:
    return (
        f"{reason}; texts that the student may answer are answered meanwhile. Send this request "
        "again in some seconds."
    )
