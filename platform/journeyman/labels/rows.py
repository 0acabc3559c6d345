"""The fate of each row on one replica: labeled, quarantined or left out, whatever the teacher does.

Errors are data. Those of a row are final and go to quarantine; those of the moment are tried
again. Where the engine dies, another is started and the rows that were in it are tried in ever
smaller groups with no others beside them, until the one to blame has died alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from journeyman.errors import ClusterError, ModelError
from journeyman.labels.schema import Filtered, Quarantined
from journeyman.recipe import Labels
from journeyman.teacher.answers import ContextOverflow, Labeled, RowError
from journeyman.teacher.engine import EngineDied
from journeyman.teacher.remote import RateLimited, Unreachable
from journeyman.teacher.tasks import Task, row_values

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_GROUPS = 8  # parts of a suspected group, see attempts.py

Row = dict[str, Any]  # of a corpus shard
Fate = Labeled | Quarantined | Filtered


class Backend(Protocol):
    """What answers: an engine of ours, or a URL."""

    @property
    def alive(self) -> bool: ...
    async def start(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Suspect:
    """A row that was in a dying engine; deaths_alone: so often with no other row beside it."""

    row: Row
    fate: asyncio.Future[Fate]
    attempts: int = 0
    deaths_alone: int = 0


class RowLabeler:
    """Labels rows on one backend; use it from one event loop."""

    def __init__(
        self,
        labels: Labels,
        backend: Backend,
        task: Task,
        in_flight: int,
        on_restart: Callable[[], None],
        outage_s: float = 600.0,
        blamed_at_first: int = 3,
        salt: int = 0,
    ) -> None:
        """in_flight: rows that the backend has at a time; outage_s: how long to wait for a
        teacher that answers no row at all, before ClusterError stops the run; blamed_at_first:
        rows that may kill an engine which has answered none, before ModelError stops it; salt: 64
        bits of the teacher's own, so that two teachers do not draw by the same numbers."""
        self._labels = labels
        self._backend = backend
        self._task = task
        self._gate = _Gate()
        self._slots = asyncio.Semaphore(in_flight)
        self._slots_alone = asyncio.Semaphore(in_flight)
        self._on_restart = on_restart
        self._outage = _Outage(outage_s)
        self._blamed_at_first = blamed_at_first
        self._n_blamed = 0
        self._salt = salt
        self._answered: Row | None = None  # the last row that was
        self._suspects: list[_Suspect] = []
        self._settling: asyncio.Task[None] | None = None

    async def fate(self, row: Row) -> Fate:
        """What becomes of a row, beside as many others as there are slots."""
        try:
            return await self._answer(row, self._beside_others)
        except EngineDied:
            return await self._suspected(row)

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Inside, no rows run but those of ``fates_alone``."""
        return self._gate.alone()

    async def fates_alone(self, rows: Sequence[Row]) -> list[Fate]:
        """What becomes of rows under suspicion; call it inside ``alone``."""
        group = [_Suspect(row, _future()) for row in rows]
        await self._settle(group)
        return [suspect.fate.result() for suspect in group]

    @contextlib.asynccontextmanager
    async def _beside_others(self) -> AsyncIterator[None]:
        # The slot first: a row that waits for one is not in the engine, so no suspect if it dies.
        async with self._slots, self._gate.together():
            yield

    async def _answer(
        self, row: Row, entered: Callable[[], AbstractAsyncContextManager[None]]
    ) -> Fate:
        """Attempts at a row until the teacher answers; raises EngineDied, ClusterError."""
        attempts = 0
        while True:
            successes = self._outage.successes
            try:
                async with entered():
                    fate = await self._run(row)
                self._outage.over()
                self._answered = row
                return fate
            except (TimeoutError, Unreachable) as reason:
                # Where no other row is answered either, it is the teacher that fails; and too many
                # requests are no row's fault.
                limited = isinstance(reason, RateLimited)
                heard = self._outage.successes > successes
                attempts += isinstance(reason, TimeoutError) or (heard and not limited)
                if attempts >= self._labels.max_attempts:
                    return _unanswered(row, reason, attempts)
                if isinstance(reason, TimeoutError):
                    continue
                try:
                    await self._outage.wait(reason)
                except ClusterError:
                    if limited or not await self._answers_another(entered):
                        raise
                    return _unanswered(row, reason, attempts + 1)

    async def _answers_another(
        self, entered: Callable[[], AbstractAsyncContextManager[None]]
    ) -> bool:
        """Whether the teacher still answers a row that it has answered before."""
        if self._answered is None:
            return False
        try:
            async with entered():
                await self._run(self._answered)
        except (TimeoutError, Unreachable):
            return False
        return True

    async def _run(self, row: Row) -> Fate:
        """One attempt; errors of the row are fates, those of the teacher are raised."""
        try:
            seed = int(row["id"][:16], 16) ^ self._salt
            return await self._task.run(columns_of(row), seed=seed)
        except ContextOverflow as reason:
            if self._labels.overflow == "skip":
                return Filtered(id=row["id"], input=_json(row), filter="overflow",
                                value=float(reason.n_tokens))  # fmt: skip
            return quarantined(row, "ContextOverflow", str(reason), 1)
        except RowError as reason:
            return quarantined(row, type(reason).__name__, str(reason), 1)
        except ValueError as reason:  # vLLM refuses the request: it always will
            message = str(reason).partition("\n")[0] or "the engine refuses it"
            return quarantined(row, "InvalidRequest", message, 1)

    async def _suspected(self, row: Row) -> Fate:
        suspect = _Suspect(row, _future(), attempts=1)
        self._suspects.append(suspect)
        if self._settling is None:
            self._gate.close()
            self._settling = asyncio.create_task(self._settle_all())
        return await suspect.fate

    async def _settle_all(self) -> None:
        taken: list[_Suspect] = []
        try:
            async with self._gate.alone():
                while self._suspects:
                    group, self._suspects = self._suspects, []
                    taken += group
                    await self._settle(group)
                await self._restart()
        except Exception as error:  # those that wait for their rows raise it: nobody else would
            waiting, self._suspects = taken + self._suspects, []
            for suspect in waiting:
                if not suspect.fate.done():
                    suspect.fate.set_exception(error)
        finally:
            self._settling = None

    async def _settle(self, group: list[_Suspect]) -> None:
        """Run rows that were in a dying engine; split them up when it dies again."""
        await self._restart()
        await asyncio.gather(*(self._retry(suspect) for suspect in group))
        died = [suspect for suspect in group if not suspect.fate.done()]
        if died and len(group) == 1:
            (suspect,) = died
            suspect.deaths_alone += 1
            if suspect.deaths_alone >= self._labels.max_attempts:
                self._n_blamed += 1
                if not self._outage.successes and self._n_blamed >= self._blamed_at_first:
                    raise ModelError(
                        f"vLLM's engine died on each of {self._n_blamed} rows that it was given "
                        "alone, and has answered none: it is not the rows. Its own log, in the "
                        "replica's log file, says why; look at teacher.dtype, max_model_len, "
                        "tensor_parallel_size, pipeline_parallel_size and engine_args."
                    )
                message = "the engine died on this row alone, again and again."
                suspect.fate.set_result(
                    quarantined(suspect.row, "EngineDied", message, suspect.attempts)
                )
                await self._restart()
                return
        size = max(1, -(-len(died) // _GROUPS))
        for i in range(0, len(died), size):
            await self._settle(died[i : i + size])

    async def _retry(self, suspect: _Suspect) -> None:
        suspect.attempts += 1
        try:
            suspect.fate.set_result(await self._answer(suspect.row, lambda: self._slots_alone))
        except EngineDied:
            pass
        except Exception as error:  # whoever waits for this row raises it
            suspect.fate.set_exception(error)

    async def _restart(self) -> None:
        if self._backend.alive:
            return
        try:
            await self._backend.start()
        except ModelError:
            # Only a process that cannot start its engine again leaves; Ray starts another one.
            os._exit(1)
        self._on_restart()


class _Outage:
    """A teacher behind a URL that answers nobody: wait, ever longer, instead of blaming rows."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._since: float | None = None
        self.successes = 0

    def over(self) -> None:
        self.successes += 1
        self._since = None

    async def wait(self, reason: Unreachable) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        lasted = now - self._since
        if lasted > self._longest_s:
            raise ClusterError(
                f"the teacher has answered nothing for {lasted:.0f} s "
                f"({str(reason).rstrip('.')}); what was finished is kept: run the same "
                "command again when it is back."
            )
        asked_for = reason.retry_after_s if isinstance(reason, RateLimited) else 0.0
        pause = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, lasted))
        await asyncio.sleep(max(pause, asked_for))


class _Gate:
    """Many together, or one alone, who goes before those that come later."""

    def __init__(self) -> None:
        self._inside = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._one = asyncio.Lock()

    def close(self) -> None:
        """Let nobody in until one who was alone leaves."""
        self._open.clear()

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._one:
            self.close()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()


def _unanswered(row: Row, reason: Exception, attempts: int) -> Quarantined:
    words = str(reason) or "the teacher did not answer within its request_timeout_s."
    return quarantined(row, type(reason).__name__, words, attempts)


def columns_of(row: Row) -> dict[str, Any]:
    """A corpus row's columns as templates see them."""
    return row_values(row["text"], json.loads(row["meta"] or "{}"))


def quarantined(row: Row, error_class: str, message: str, attempts: int) -> Quarantined:
    return Quarantined(
        id=row["id"],
        input=_json(row),
        error_class=error_class,
        message=message,
        attempts=attempts,
    )


def _json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def _future() -> asyncio.Future[Fate]:
    return asyncio.get_running_loop().create_future()
