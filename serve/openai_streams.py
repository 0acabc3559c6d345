"""Answers as server-sent events, as OpenAI sends them: whole ones, or a teacher's as it is written.

Nothing is sent before it is decided who answers, and no byte is ever taken back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from journeyman.cascade.answering import Answers, listening
from journeyman.cascade.policy import Decision
from journeyman.cascade.refusals import Refusal, TeacherUnavailable
from serve import errors
from serve.openai_schema import Chat, ChatRequest, Completion, CompletionRequest


class Growing:
    """An answer on its way. Cancel ``whole`` to give it up."""

    def __init__(self, answer: Coroutine[Any, Any, Answers]) -> None:
        self._changed = asyncio.Event()
        self._so_far: Decision | None = None
        before = listening.set(self._hear)
        self.whole = asyncio.create_task(answer)  # which listens; nothing else of this request does
        listening.reset(before)
        self.whole.add_done_callback(lambda _: self._changed.set())

    async def begun(self) -> Decision | None:
        """Its beginning, once the teacher has one; None where the whole is there, or a refusal."""
        try:
            await self._changed.wait()
        except asyncio.CancelledError:
            self.whole.cancel()
            raise
        return None if self.whole.done() else self._so_far

    async def parts(self) -> AsyncIterator[Decision]:
        """What there is of it, ever more, until it is whole."""
        while not self.whole.done():
            self._changed.clear()
            if self._so_far is not None:
                yield self._so_far
            await self._changed.wait()

    def _hear(self, decision: Decision) -> None:
        if decision.label:
            self._so_far = decision
            self._changed.set()


def as_it_grows(
    growing: Growing,
    said: Callable[[Decision], str],
    finished: Callable[[Answers], Chat],
    request: ChatRequest,
    headers: Mapping[str, str],
) -> StreamingResponse:
    """A teacher's answer as it is written. said: what is sent of so much of it; finished: the
    answer as it would be without a stream."""
    held = max((len(stop) - 1 for stop in request.stops), default=0)

    async def events() -> AsyncIterator[str]:
        sent, head = "", None
        try:
            async for decision in growing.parts():
                text = said(decision)
                text = text[: max(0, len(text) - held)]  # what may become a stop string waits
                if text.startswith(sent) and len(text) > len(sent):
                    head = head or finished(Answers(decisions=(decision,)))
                    for step in ([] if sent else [_ROLE]) + [_words(text[len(sent) :])]:
                        yield _event(_chunk(head, step, request))
                    sent = text
            answers = await growing.whole
            body = finished(answers)
            body.id, body.created = (head or body).id, (head or body).created
            text = body.choices[0].message["content"]
            if not text.startswith(sent) or (sent and answers.void):  # or it is another's
                raise TeacherUnavailable("the answer broke off in its middle; ask again.")
        except Refusal as refusal:
            yield _event(errors.body_of(refusal))
            return
        body.choices[0].message["content"] = text[len(sent) :]
        for chunk in chat_chunks(body, request)[1 if sent else 0 :]:
            yield _event(chunk)
        yield _DONE

    return _Stream(growing, events(), media_type="text/event-stream", headers=dict(headers))


class _Stream(StreamingResponse):
    """Gives the answer up with its client, who may leave before there is a first event: then
    nothing within the events would run."""

    def __init__(self, growing: Growing, *content: Any, **options: Any) -> None:
        super().__init__(*content, **options)
        self._growing = growing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._growing.whole.cancel()


def whole(chunks: list[dict[str, Any]], headers: Mapping[str, str]) -> StreamingResponse:
    """One that is there already, with the headers of the response that it replaces."""

    async def events() -> AsyncIterator[str]:
        for chunk in chunks:
            yield _event(chunk)
        yield _DONE

    return StreamingResponse(events(), media_type="text/event-stream", headers=dict(headers))


def chat_chunks(chat: Chat, request: ChatRequest) -> list[dict[str, Any]]:
    said = chat.choices[0]
    steps: list[dict[str, Any]] = [
        _ROLE,
        _words(said.message["content"]) | {"logprobs": said.logprobs},
        {"delta": {}, "logprobs": None, "finish_reason": said.finish_reason},
    ]
    choices = [[{"index": 0, **step}] for step in steps]
    return _chunks(chat, _CHAT, choices, _with_usage(request))


def text_chunks(completion: Completion, request: CompletionRequest) -> list[dict[str, Any]]:
    choices = [[choice.model_dump()] for choice in completion.choices]
    return _chunks(completion, "text_completion", choices, _with_usage(request))


_CHAT = "chat.completion.chunk"
_DONE = "data: [DONE]\n\n"
_ROLE: dict[str, Any] = {
    "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None,
}  # fmt: skip


def _words(text: str) -> dict[str, Any]:
    return {"delta": {"content": text}, "logprobs": None, "finish_reason": None}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _with_usage(request: ChatRequest | CompletionRequest) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)


def _head(body: Chat | Completion, kind: str, with_usage: bool) -> dict[str, Any]:
    head = body.model_dump(include={"id", "created", "model", "system_fingerprint"})
    return head | {"object": kind} | ({"usage": None} if with_usage else {})


def _chunk(chat: Chat, step: dict[str, Any], request: ChatRequest) -> dict[str, Any]:
    return {**_head(chat, _CHAT, _with_usage(request)), "choices": [{"index": 0, **step}]}


def _chunks(
    body: Chat | Completion, kind: str, choices: list[list[dict[str, Any]]], with_usage: bool
) -> list[dict[str, Any]]:
    head = _head(body, kind, with_usage)
    chunks = [{**head, "choices": some} for some in choices]
    chunks[-1]["journeyman"] = body.journeyman.model_dump()
    if with_usage:
        chunks.append({**head, "choices": [], "usage": body.usage.model_dump()})
    return chunks
