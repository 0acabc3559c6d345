"""The teacher's deployment as the cascade asks it: by handle, and never one that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from journeyman.cascade.answering import Hear, Said, Unlabeled
from journeyman.cascade.refusals import TeacherAway, TeacherStarting, TeacherUnavailable
from journeyman.recipe import Classes
from journeyman.teacher.progress import Spent
from serve.accounts import Account, account
from serve.failures import Failed
from serve.growth import More, Whole
from serve.students import Behind
from serve.teacher import Unavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")
_log = logging.getLogger("ray.serve")

_PROBE_INTERVAL_S = 1.0
_PROBE_TIMEOUT_S = 5.0  # of a busy machine
_BACK_IN_S = 5.0  # no better is known of an engine that starts
_AVOIDED_S = 5.0  # a replica that says that it cannot; asked again, it says so in milliseconds
_MOST_ASKED = 8  # replicas, for one call
_LOOK_TIMEOUT_S = 1.0  # of all replicas, for whether one is left
_RESTS_AFTER_S = 60.0  # without a request, so that audits keep no teacher awake that may sleep
# What was done for calls that were given up is asked for every second, until every replica has long
# heard that the last of them is.
_COME_EVERY_S = 1.0
_HEARD_WITHIN_S = 5.0
_COME_TIMEOUT_S = 10.0


class TeacherByHandle:
    """The teacher, or a student that writes, as the cascade sees it. Knows whether it may be asked
    at all: a call to a deployment without a replica would wait for one until its deadline.

    A replica that says that it cannot is left alone for a while, and another is asked; only where
    all say so is the teacher away. What was in an engine that died is not asked again: it may be
    what ended it, and would end the others.

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
        what was done for requests that were given up, and for audits; None where nobody counts."""
        self._handle, self._which = handle, which
        self._bill = bill
        self._given_up_at = 0.0  # the last call
        self._requested_at = -math.inf  # the last call that was no audit's
        self._coming: asyncio.Task[None] | None = None
        self._avoided_until: dict[str, float] = {}  # by replica
        self._looking: asyncio.Task[None] | None = None
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

    @property
    def rests(self) -> bool:
        """Whether it sleeps, or would soon if it were asked for nothing but requests."""
        if not self._may_sleep:
            return False
        return self.n_running == 0 or time.monotonic() > self._requested_at + _RESTS_AFTER_S

    def count(self, n_running: int) -> None:
        self.n_running = n_running

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> Sequence[Said]:
        """Raises TeacherUnavailable. hear: told of the one text's answer as it grows."""
        return await self._asked(
            lambda avoid: self._written(texts, hear, avoid) if hear else self._labeled(texts, avoid)
        )

    async def judged(self, rows: Sequence[Mapping[str, Any]], asked: Classes) -> Sequence[Said]:
        """For audits; raises TeacherUnavailable. asked: of each row."""
        return await self._asked(lambda avoid: self._verdicts(rows, asked, avoid))

    async def scores(self, texts: Sequence[str], stage: int) -> np.ndarray | Behind:
        """float32[n, c], logits of a student that classifies; stage: its place among those that are
        asked in turn. Raises TeacherUnavailable, too, once it is found away: where its last replica
        was lost, Serve has calls wait for another one."""
        asked: asyncio.Future[np.ndarray | Behind] = asyncio.ensure_future(
            self._asked(lambda avoid: self._scored(texts, stage, avoid))
        )
        try:
            while not (await asyncio.wait({asked}, timeout=_PROBE_INTERVAL_S))[0]:
                if self.unready:
                    raise TeacherAway(_words(self.unready), _BACK_IN_S)
            return await asked
        finally:
            asked.cancel()

    async def _asked(self, call: Callable[[dict[str, Any]], Awaitable[T | Unavailable]]) -> T:
        if not ((whose := account.get()) and whose.is_audit):
            self._requested_at = time.monotonic()
        if self._looking and not self._looking.done():
            await asyncio.wait({self._looking})
        if self.asleep:
            self._wake()
            raise TeacherStarting(_words(self._starting), self._started_in_s)
        if self.unready:
            raise TeacherAway(_words(self.unready), _BACK_IN_S)
        try:
            reply = await self._of_one_that_can(call)
        except RayTaskError as error:  # of this request alone, for all anyone knows
            _log.warning("the %s failed on a request: %s", self._whose, _kind(error))
            away = _unavailable(f"the {self._whose} failed on this request")
        except (RayError, RayServeException) as error:
            self._look()
            away = _unavailable(self._gone, getattr(error, "actor_id", None))
        else:
            if not isinstance(reply, Unavailable):
                if self._bill and whose and whose.is_audit:  # else counted by its answer
                    self._bill(whose, _spent_on(cast(Sequence[Said], reply)))
                return reply
            away = _unavailable(reply.reason, reply.replica or None, reply.begun)
        raise away  # not chained to an error, whose words may quote a text

    async def _of_one_that_can(
        self, ask: Callable[[dict[str, Any]], Awaitable[T | Unavailable]]
    ) -> T | Unavailable:
        """ask: with what tells the router whom to avoid."""
        for _ in range(_MOST_ASKED):
            avoided = self._avoided()
            reply = await ask({"avoid": avoided} if avoided else {})
            if not isinstance(reply, Unavailable):
                break
            self._avoided_until[reply.replica] = time.monotonic() + _AVOIDED_S
            if reply.begun:
                break
            if reply.replica in avoided:  # there is no other
                self._know(reply.reason)
                self._avoided_until.clear()  # so that each is asked again whether it can
                break
        return reply

    def _avoided(self) -> list[str]:
        now = time.monotonic()
        self._avoided_until = {
            name: until for name, until in self._avoided_until.items() if now < until
        }
        return [*self._avoided_until]

    async def _labeled(
        self, texts: Sequence[str], avoid: dict[str, Any]
    ) -> Sequence[Said] | Unavailable:
        response = self._handle.label.remote(list(texts), *self._named, **avoid)
        with self._cancelled(response):
            reply: Sequence[Said] | Unavailable = await response
            return reply

    async def _verdicts(
        self, rows: Sequence[Mapping[str, Any]], asked: Classes, avoid: dict[str, Any]
    ) -> Sequence[Said] | Unavailable:
        # By keyword: what is routed by its beginning are texts, and these are none.
        whose = account.get()
        response = self._handle.judge.remote(rows=list(rows), asked=asked, account=whose, **avoid)
        with self._cancelled(response):
            reply: Sequence[Said] | Unavailable = await response
            return reply

    async def _scored(
        self, texts: Sequence[str], stage: int, avoid: dict[str, Any]
    ) -> np.ndarray | Behind | Unavailable:
        response = self._handle.score.remote(list(texts), *self._which, stage, **avoid)
        with self._cancelled(response):
            reply: np.ndarray | Behind | Unavailable = await response
            return reply

    async def _written(
        self, texts: Sequence[str], hear: Hear, avoid: dict[str, Any]
    ) -> Sequence[Said] | Unavailable:
        [text] = texts
        response = self._handle.options(stream=True).speak.remote(text, *self._named, **avoid)
        said: Said | Unavailable = Unavailable(reason=self._gone, begun=True)
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
            self._coming = _outliving(self._came(ingress, bill))

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
            self._waking = _outliving(self._woken())

    async def _woken(self) -> None:
        since = time.monotonic()
        with contextlib.suppress(RayError, RayServeException):
            await self._handle.unready.remote(*self._which)
            self.n_running = 1
            self._started_in_s = time.monotonic() - since

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                if await self._of_one_that_can(self._ask_whether) is None:
                    self.unready = None
        except TimeoutError:
            self.unready = self.unready or f"the {self._whose} does not answer"
        except (RayError, RayServeException):
            self._look()

    async def _ask_whether(self, avoid: dict[str, Any]) -> Unavailable | None:
        response = self._handle.unready.remote(*self._which, **avoid)
        try:
            cannot: Unavailable | None = await response
            return cannot
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _look(self) -> None:
        """A replica is gone: whether another is left, which requests wait for, as it is said at
        once."""
        if not self._may_sleep and (self._looking is None or self._looking.done()):
            self._looking = _outliving(self._looked())

    async def _looked(self) -> None:
        """By asking all, since one would be waited for where there is none."""
        found: list[Unavailable | BaseException | None] = []
        with contextlib.suppress(RayError, RayServeException, TimeoutError):
            asked = self._handle.broadcast("unready", *self._which)
            found = await asked.results_async(timeout_s=_LOOK_TIMEOUT_S, return_exceptions=True)
        if None in found:
            return
        reasons = [one.reason for one in found if isinstance(one, Unavailable)]
        self._know(reasons[0] if reasons else self._gone)


def _outliving(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Serve ends the tasks of a request with it: in a context of its own this one lives on."""
    return contextvars.Context().run(asyncio.get_running_loop().create_task, work)


def _kind(error: RayTaskError) -> str:
    cause: object = error.cause
    return str(cause) if isinstance(cause, Failed) else type(cause).__name__


def _spent_on(reply: Sequence[Said]) -> Spent:
    spent = Spent()
    for said in reply:
        if not isinstance(said, Unlabeled):
            spent.add(
                Spent(n_prompt_tokens=said.n_prompt_tokens, n_output_tokens=said.n_output_tokens)
            )
    return spent


def _unavailable(
    reason: str, replica: str | None = None, had_texts: bool = True
) -> TeacherUnavailable:
    return TeacherUnavailable(_words(reason), _BACK_IN_S, replica, had_texts)


def _words(reason: str) -> str:
    return (
        f"{reason}; texts that the student may answer are answered meanwhile. Send this request "
        "again in some seconds."
    )
