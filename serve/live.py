"""What answers now: one bundle, or two while a candidate is tried beside it.

A bundle is loaded beside the one that answers and then takes its place in one assignment, so no
request is dropped and each is answered by one bundle from its beginning to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from journeyman.cascade.recording import Answering
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from journeyman.errors import BundleMismatch, ClusterError, JourneymanError

_log = logging.getLogger("ray.serve")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # before a bundle that was out of reach is tried again
_MOST_SHADOWED = 256  # texts that wait for a shadow at a time; further ones are not tried


class Candidate(BaseModel):
    """A second bundle that is tried."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    mode: Literal["shadow", "canary"] = Field(
        "shadow",
        description="shadow: decides on the same texts without answering, and is counted. canary: "
        "answers a share of the texts.",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Of all texts, chosen by their hash: a text stays with one."
    )


class UserConfig(BaseModel):
    """What Serve may change while the cascade runs (``user_config`` of the deployment Cascade)."""

    model_config = ConfigDict(extra="forbid")

    bundle: str | None = Field(None, description="Without one the application's own answers.")
    candidate: Candidate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One bundle and what answers by it. longest_s: that a request may take with it; tightened:
    whether audits have found its promise broken."""

    bundle: PolicyBundle | WrittenBundle
    answering: Answering
    figures: Callable[[], dict[str, Any]]
    decide: Callable[[Sequence[str]], Awaitable[object]]  # by the student alone, and counted
    close: Callable[[], Coroutine[Any, Any, None]]
    longest_s: float
    unready: Callable[[], str | None] = lambda: None  # why its student cannot decide now
    tightened: Callable[[], bool] = lambda: False

    @property
    def guarantee(self) -> Literal["holds", "tightened"]:
        """What holds now of the promise, but for single answers, in the words of our headers."""
        return "tightened" if self.tightened() else "holds"


class Live:
    """Holds what answers, and exchanges it."""

    def __init__(
        self,
        first: Served,
        load: Callable[[str | None, str], Awaitable[Served | None]],
    ) -> None:
        """load: where a bundle lies, None being the first one's place, and the id of one that
        is not to be loaded, for which it returns None; raises JourneymanError."""
        self._load = load
        self._main = first
        self._candidate: Served | None = None
        self._tried: Candidate | None = None
        self._wanted = self._is = UserConfig()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: list[Served] = []  # that still answer what they began
        self._n_shadowing = self._n_not_shadowed = 0  # texts, of this candidate
        self.failure: str | None = None  # why what was asked for last does not answer

    @property
    def bundle(self) -> PolicyBundle | WrittenBundle:
        """The one that answers; a candidate's stands in the figures."""
        return self._main.bundle

    @property
    def unready(self) -> str | None:
        """Why not everything can answer yet."""
        return self._main.unready()

    def served(self, texts: Sequence[str]) -> Served:
        """Who answers this request."""
        if self._candidate is None or self._tried is None or not self._chosen(texts):
            return self._main
        away = self._candidate.unready() is not None  # then it is left out
        if self._tried.mode == "canary":
            return self._main if away else self._candidate
        if away or self._n_shadowing + len(texts) > _MOST_SHADOWED:
            self._n_not_shadowed += len(texts)
        else:
            self._n_shadowing += len(texts)
            self._begin(self._shadow(self._candidate, texts))
        return self._main

    def figures(self) -> dict[str, Any]:
        """Of what answers, of what is tried, and what went wrong with a change."""
        tried = self._candidate
        return {
            "bundle": self.bundle.bundle_id,
            "guarantee": self._main.guarantee,
            **self._main.figures(),
            "candidate": None
            if tried is None or self._tried is None
            else {
                "bundle": tried.bundle.bundle_id,
                "guarantee": tried.guarantee,
                "mode": self._tried.mode,
                "share": self._tried.share,
                "not_shadowed": self._n_not_shadowed,
                "unready": tried.unready(),
                **tried.figures(),
            },
            "reload_failure": self.failure,
        }

    async def close(self) -> None:
        """Of all bundles, when the replica stops: what they keep is finished."""
        for task in self._tasks:
            task.cancel()
        here = (self._main, self._candidate, *self._leaving)
        await asyncio.gather(*(served.close() for served in here if served))

    def follow(self, user_config: dict[str, Any] | None) -> None:
        """Returns at once and never raises: Serve replaces a replica whose ``reconfigure`` fails,
        and one that blocks answers nobody. user_config: None where the deployment has none."""
        try:
            self._wanted = UserConfig.model_validate(user_config or {})
        except ValidationError as error:
            self._fail(f"user_config: {error.errors()[0]['msg']}")
            return
        self._stop_trying(but=self._wanted.candidate)
        self._changed.set()
        if self._following is None or self._following.done():
            self._following = self._begin(self._follow())

    async def _follow(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:  # it may change while a bundle is loaded
            wanted = self._wanted
            self._changed.clear()
            try:
                await self._become(wanted)
                self.failure = None
            except ClusterError as error:  # of a store that is away, say
                self._fail(str(error))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            except JourneymanError as error:
                self._fail(str(error))
            except Exception as error:  # a good replica must outlive any bad bundle
                self._fail(f"{type(error).__name__}: {error}")
            if wanted is self._wanted:
                return

    async def _become(self, wanted: UserConfig) -> None:
        self._stop_trying(but=wanted.candidate)
        if wanted.bundle is not None or self._is.bundle is not None:
            fresh = await self._load(wanted.bundle, self.bundle.bundle_id)
            if fresh is not None:
                self._main, before = fresh, self._main
                _log.info("bundle %s answers in place of %s", fresh.bundle.bundle_id,
                          before.bundle.bundle_id)  # fmt: skip
                self._close(before)
            self._is = wanted
        if wanted.candidate and self._candidate is None:
            tried = await self._load(wanted.candidate.bundle, self.bundle.bundle_id)
            if tried is None:
                raise BundleMismatch(f"candidate: {wanted.candidate.bundle} answers already.")
            self._candidate, self._tried = tried, wanted.candidate
            self._n_not_shadowed = 0

    def _stop_trying(self, but: Candidate | None) -> None:
        """At once, whatever becomes of the rest of what is wanted."""
        if self._candidate and self._tried != but:
            self._close(self._candidate)
            self._candidate = self._tried = None

    async def _shadow(self, candidate: Served, texts: Sequence[str]) -> None:
        try:
            await candidate.decide(texts)
        except Exception as error:  # it may not harm the one that answers
            self._fail(f"shadow: {type(error).__name__}")  # its words may quote the text
        finally:
            self._n_shadowing -= len(texts)

    def _close(self, served: Served) -> None:
        """Once its last request has its answer."""

        async def later() -> None:
            await asyncio.sleep(served.longest_s)
            await served.close()
            self._leaving.remove(served)  # now, so that one cut off here is closed once more

        self._leaving.append(served)
        self._begin(later())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Serve ends the tasks of a request with it: in a context of their own they live on."""
        task = contextvars.Context().run(asyncio.get_running_loop().create_task, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _chosen(self, texts: Sequence[str]) -> bool:
        assert self._tried is not None
        digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self._tried.share * 2**64

    def _fail(self, why: str) -> None:
        self.failure = why
        _log.error("the bundle that was asked for does not answer: %s", why)
