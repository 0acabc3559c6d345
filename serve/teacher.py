"""The teacher's deployment: one vLLM engine that answers texts as labeling answered its rows.

The replica owns the engine, in an event loop of its own: starting one blocks for half a minute,
and meanwhile the replica goes on answering that it cannot. Where the engine dies, the replica
starts another; where that fails, its health check does too, and Serve replaces the replica.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.serve.exceptions import RayServeException

from journeyman import models
from journeyman.cascade.answering import Said, Unlabeled
from journeyman.cascade.policy import Written
from journeyman.columns import unpacked
from journeyman.errors import JourneymanError
from journeyman.labels.codec import Codec
from journeyman.models import Model
from journeyman.recipe import Classes, Generate, Labels
from journeyman.recipe import Teacher as TeacherSettings
from journeyman.student import writing
from journeyman.teacher import tasks
from journeyman.teacher.answers import (
    ClassLabels,
    GeneratedLabels,
    NotFinite,
    RationaleLabels,
    RowError,
)
from journeyman.teacher.engine import Engine, EngineDied
from journeyman.teacher.pieces import Pieces
from journeyman.teacher.progress import Begun, Spent, hearing, priority, spending
from journeyman.teacher.tasks import Task
from serve.accounts import Account, GivenUp
from serve.failures import failed, without_words
from serve.growth import More, gained

T = TypeVar("T")

_WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """The teacher cannot answer now. A value, not an error: Serve logs errors with tracebacks.

    replica: that says so; begun: its engine had the texts, and one of them may be what ended it.
    """

    reason: str
    replica: str = ""
    begun: bool = False


class Teacher:
    """Answers ``label``, ``speak``, ``judge``, ``given_up`` and ``unready`` by handle."""

    whose = "teacher"  # in sentences

    def __init__(
        self,
        settings: TeacherSettings,
        labels: Labels,
        columns: Sequence[str],
        model: Model,
        node_labels: dict[str, str] | None = None,
    ) -> None:
        """Starts the engine; raises ModelError or RecipeError. columns: the bundle's; node_labels:
        of the nodes over which an engine may spread."""
        self._columns = columns
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True).start()
        found = models.here(model, lambda: models.teacher(settings))
        self._engine = Engine(settings, found, node_labels=node_labels)
        self._failure: str | None = None  # why the engine did not start again
        self._given_up = GivenUp()
        asyncio.run_coroutine_threadsafe(self._engine.start(), self._loop).result()
        if isinstance(labels, Generate):
            labels = labels.model_copy(update=writing.LIKELIEST)
        self._labels = labels
        self._task = tasks.local(labels, self._engine)
        self._codec = Codec(name="topk_fp16", vocab_size=model.vocab_size, k=1)
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def label(
        self, texts: Sequence[str], account: Account | None = None, avoid: Sequence[str] = ()
    ) -> list[Said] | Unavailable:
        """The teacher's answers, one for each text; stops when the call is cancelled, and then
        keeps under this account what was read and written until then; raises Failed. avoid: for the
        router."""
        return await self._while_ready(lambda: self._label(texts, account))

    async def judge(
        self,
        rows: Sequence[Mapping[str, Any]],
        asked: Classes,
        account: Account | None = None,
        avoid: Sequence[str] = (),
    ) -> list[Said] | Unavailable:
        """Its verdicts on pairs of answers, one for each row, for audits; stops when the call is
        cancelled, as ``label`` does; raises Failed. asked: by the bundle that answers, which may
        have been exchanged since; avoid: for the router."""
        return await self._while_ready(lambda: self._judge(rows, asked, account))

    async def speak(
        self, text: str, account: Account | None = None, avoid: Sequence[str] = ()
    ) -> AsyncIterator[More | Said | Unavailable]:
        """What the teacher's answer gains as it grows, and at last the whole of it, as ``label``
        gives it; stops when the call is cancelled; raises Failed. Reasonings that vote are heard
        once they have voted."""
        heard: asyncio.Queue[Begun | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(begun: Begun) -> None:  # in the engine's loop
            loop.call_soon_threadsafe(heard.put_nowait, begun)

        listening = contextvars.copy_context()
        if isinstance(self._labels, Generate):
            listening.run(hearing.set, hear)
        whole = loop.create_task(self.label([text], account), context=listening)
        whole.add_done_callback(lambda _: heard.put_nowait(None))
        told = None
        try:
            so_far, n_tokens, pieces = "", 0, self._pieces()
            while (begun := await heard.get()) is not None:
                tokens = pieces.add(self._shown(begun.token_ids[n_tokens:]))
                yield gained(so_far, begun.text, tokens)
                so_far, n_tokens = begun.text, n_tokens + len(tokens)
            reply = await whole
            yield reply if isinstance(reply, Unavailable) else reply[0]
        except Exception as error:
            told = failed(error)
        finally:
            whole.cancel()
        if told:
            raise told

    async def given_up(self, ingress: str) -> dict[Account, Spent]:
        """What was done for its requests that ended before their answer, since it last asked."""
        return self._given_up.take(ingress)

    async def unready(self, avoid: Sequence[str] = ()) -> Unavailable | None:
        """Why the teacher cannot answer, None if it can. avoid: for the router."""
        if self._engine.alive:
            return None
        return Unavailable(reason=self._failure or self._restarting, replica=this_replica())

    @property
    def _restarting(self) -> str:
        return f"the {self.whose}'s engine died and is starting again"

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this three times."""
        if self._failure and not self._engine.alive:
            raise RuntimeError(self._failure)

    async def close(self) -> None:
        """End the engine and its thread, and let the replica live on."""

        async def end() -> None:
            self._engine.close()

        self._watching.cancel()
        await self._in_engine_loop(end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def stop(self) -> None:
        """End the engine, of a replica that stops."""
        if hasattr(self, "_watching"):
            self._watching.cancel()
        if hasattr(self, "_engine"):
            self._engine.close()

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        self.stop()

    async def _while_ready(
        self, work: Callable[[], Coroutine[Any, Any, list[Said]]]
    ) -> list[Said] | Unavailable:
        if cannot := await self.unready():
            return cannot
        try:
            return await self._in_engine_loop(without_words(work(), EngineDied, TimeoutError))
        except EngineDied:
            reason = self._restarting
        except TimeoutError:
            reason = f"the {self.whose}'s engine does not answer"
        return Unavailable(reason=reason, replica=this_replica(), begun=True)

    async def _label(self, texts: Sequence[str], account: Account | None) -> list[Said]:
        return await self._kept_if_given_up(map(self._label_one, texts), account)

    async def _judge(
        self, rows: Sequence[Mapping[str, Any]], asked: Classes, account: Account | None
    ) -> list[Said]:
        task = tasks.local(asked, self._engine)
        return await self._kept_if_given_up((self._said(task, row) for row in rows), account)

    async def _kept_if_given_up(
        self, work: Iterable[Coroutine[Any, Any, Said]], account: Account | None
    ) -> list[Said]:
        spending.set(spent := Spent())  # of this call, whose task this is
        priority.set(int(account is not None and account.is_audit))
        try:
            return await asyncio.gather(*work)
        except asyncio.CancelledError:
            self._given_up.add(account, spent)
            raise

    async def _label_one(self, text: str) -> Said:
        return await self._said(self._task, unpacked(text, self._columns))

    async def _said(self, task: Task, row: Mapping[str, Any]) -> Said:
        try:
            labels = await task.run(row)
        except RowError as error:
            return Unlabeled(reason=str(error), is_garbage=isinstance(error, NotFinite))
        if isinstance(labels, ClassLabels):
            return labels
        assert isinstance(labels, GeneratedLabels | RationaleLabels)  # a bundle has no others
        return self._written(labels)

    def _written(self, labels: GeneratedLabels | RationaleLabels) -> Written:
        """Its log-probabilities as certification read them: packed by the codec, and unpacked."""
        tokens: tuple[str, ...] = ()
        logprobs = np.empty(0)
        if isinstance(labels, GeneratedLabels) and (recorded := labels.recorded) is not None:
            likeliest = recorded.token_ids[:, :1], recorded.logprobs[:, :1]
            if np.array_equal(likeliest[0][:, 0], labels.token_ids):  # greedy, that is
                packed = self._codec.encode(*likeliest)
                logprobs = self._codec.decode(packed, len(recorded)).logprobs[:, 0]
            pieces = self._pieces()
            tokens = pieces.add(self._shown(labels.token_ids.tolist()))
            if tokens:
                tokens = (*tokens[:-1], tokens[-1] + pieces.rest())
        return Written(
            text=labels.output if isinstance(labels, GeneratedLabels) else labels.answer,
            tokens=tokens,
            logprobs=logprobs.astype(np.float64),
            finish_reason="length" if labels.finish_reason == "length" else "stop",
            n_prompt_tokens=labels.n_prompt_tokens,
            n_output_tokens=labels.n_output_tokens,
        )

    def _pieces(self) -> Pieces:
        return Pieces(partial(self._engine.tokenizer.decode, skip_special_tokens=True))

    def _shown(self, ids: list[int]) -> list[int]:
        """Without the one that ended the answer."""
        return ids[:-1] if ids and ids[-1] in self._engine.tokenizer.all_special_ids else ids

    async def _watch(self) -> None:
        """Start the engine again whenever it has died; in the engine's loop, which it blocks."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            if self._engine.alive:
                continue
            try:
                await self._engine.start()
                self._failure = None
            except JourneymanError as error:
                self._failure = str(error)
            except Exception as error:  # else nobody would try again, and Serve not know of it
                self._failure = f"{type(error).__name__}: {error}"

    async def _in_engine_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return await asyncio.wrap_future(future)


def this_replica() -> str:
    """Its id, as routers have it; "" outside of Serve."""
    try:
        name: str = serve.get_replica_context().replica_id.unique_id
        return name
    except RayServeException:
        return ""
