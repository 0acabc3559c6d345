"""The teacher's deployment: one vLLM engine that scores texts as labeling scored its rows.

The replica owns the engine, in an event loop of its own: starting one blocks for half a minute,
and meanwhile the replica goes on answering that it cannot. Where the engine dies, the replica
starts another; where that fails, its health check does too, and Serve replaces the replica.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from journeyman import models
from journeyman.cascade.answering import Unlabeled
from journeyman.columns import unpacked
from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.recipe import Classes
from journeyman.recipe import Teacher as TeacherSettings
from journeyman.teacher.answers import ClassLabels, RowError
from journeyman.teacher.classes import ClassTask
from journeyman.teacher.engine import Engine, EngineDied

T = TypeVar("T")

_WATCH_INTERVAL_S = 0.5
_RESTARTING = "the teacher's engine died and is starting again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """The teacher cannot answer now. A value, not an error: Serve logs errors with tracebacks."""

    reason: str


class Teacher:
    """Answers ``label`` and ``unready`` by handle."""

    def __init__(
        self, settings: TeacherSettings, labels: Classes, columns: Sequence[str], model: Model
    ) -> None:
        """Starts the engine; raises ModelError or RecipeError. columns: the bundle's."""
        self._columns = columns
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True).start()
        self._engine = Engine(settings, models.here(model, lambda: models.teacher(settings)))
        self._failure: str | None = None  # why the engine did not start again
        asyncio.run_coroutine_threadsafe(self._engine.start(), self._loop).result()
        self._task = ClassTask(labels, self._engine)
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def label(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled] | Unavailable:
        """The teacher's labels, one for each text; stops when the call is cancelled."""
        if reason := await self.unready():
            return Unavailable(reason=reason)
        try:
            return await self._in_engine_loop(self._label(texts))
        except EngineDied:
            return Unavailable(reason=_RESTARTING)
        except TimeoutError:
            return Unavailable(reason="the teacher's engine does not answer")

    async def unready(self) -> str | None:
        """Why the teacher cannot answer, None if it can."""
        if self._engine.alive:
            return None
        return self._failure or _RESTARTING

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this three times."""
        if self._failure and not self._engine.alive:
            raise RuntimeError(self._failure)

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        if hasattr(self, "_watching"):
            self._watching.cancel()
        if hasattr(self, "_engine"):
            self._engine.close()

    async def _label(self, texts: Sequence[str]) -> list[ClassLabels | Unlabeled]:
        return await asyncio.gather(*(self._label_one(text) for text in texts))

    async def _label_one(self, text: str) -> ClassLabels | Unlabeled:
        try:
            return await self._task.run(unpacked(text, self._columns))
        except RowError as error:
            return Unlabeled(reason=str(error))

    async def _watch(self) -> None:
        """Start the engine again whenever it has died; in the engine's loop, which it blocks."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if self._engine.alive:
                continue
            try:
                await self._engine.start()
                self._failure = None
            except ModelError as error:
                self._failure = str(error)

    async def _in_engine_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return await asyncio.wrap_future(future)
