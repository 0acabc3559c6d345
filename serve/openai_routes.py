"""OpenAI's endpoints in front of a cascade: the answer to a message is its label, or what is
written to it.

Streams begin once the decision has been made, so no byte is ever taken back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from journeyman.cascade.answering import Answers, Asked
from journeyman.cascade.refusals import ColumnsRefused
from journeyman.certify.bundle import PolicyBundle, WrittenBundle
from serve import errors
from serve.live import Live
from serve.openai_answers import said
from serve.openai_schema import (
    Chat,
    ChatChoice,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    Note,
    TextChoice,
    TokenUsage,
)
from serve.schema import headers_of, probabilities_of, promise_of

_RESPONSES: dict[int | str, dict[str, Any]] = {
    **errors.DESCRIBED,
    200: {"content": {"text/event-stream": {}}},  # with stream: true
}
_MODELS: tuple[Asked, ...] = ("cascade", "student", "teacher")


def routes(live: Live) -> APIRouter:
    """/v1/models, /v1/chat/completions, /v1/completions."""
    router = APIRouter()
    since = int(time.time())

    async def ask(
        texts: list[str], request: ChatRequest | CompletionRequest
    ) -> tuple[PolicyBundle | WrittenBundle, Answers]:
        if live.bundle.columns != ("text",):
            raise ColumnsRefused(
                f"this cascade classifies rows of {', '.join(live.bundle.columns)}, which a prompt "
                "has no place for; ask /v1/classify."
            )
        served = live.served(texts)
        return served.bundle, await served.answering.answer(texts, request.model)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The cascade, and each of its two models alone."""
        return ModelList(data=[ModelCard(id=name, created=since) for name in _MODELS])

    @router.post("/v1/chat/completions", responses=_RESPONSES)
    async def chat(request: ChatRequest, response: Response) -> Chat:
        """Answer a user's message, with its label where the cascade classifies."""
        bundle, answers = await ask([request.messages[0].text], request)
        answer = said(answers.decisions[0], bundle, request)
        logprobs = answer.chat_logprobs(request.top_logprobs or 0) if request.logprobs else None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        body = Chat(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=[
                ChatChoice(
                    index=0,
                    finish_reason=answer.finish_reason,
                    logprobs=logprobs,
                    message=message,
                )
            ],
            usage=_usage(answers),
            system_fingerprint=bundle.bundle_id,
            journeyman=_note(answers, bundle, request.model, as_asked=answer.whole),
        )
        response.headers.update(headers_of(answers, bundle, request.model, as_asked=answer.whole))
        if request.stream:
            return _streamed(_chat_chunks(body, _with_usage(request)), response)  # type: ignore[return-value]
        return body

    @router.post("/v1/completions", responses=_RESPONSES)
    async def completions(request: CompletionRequest, response: Response) -> Completion:
        """Answer one prompt or several, with their labels where the cascade classifies."""
        bundle, answers = await ask(request.texts, request)
        all_said = [said(decision, bundle, request) for decision in answers.decisions]
        whole = all(answer.whole for answer in all_said)
        body = Completion(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model,
            choices=[
                TextChoice(
                    index=i,
                    finish_reason=answer.finish_reason,
                    text=answer.text,
                    logprobs=None
                    if request.logprobs is None
                    else answer.text_logprobs(request.logprobs),
                )
                for i, answer in enumerate(all_said)
            ],
            usage=_usage(answers),
            system_fingerprint=bundle.bundle_id,
            journeyman=_note(answers, bundle, request.model, as_asked=whole),
        )
        response.headers.update(headers_of(answers, bundle, request.model, as_asked=whole))
        if request.stream:
            return _streamed(_text_chunks(body, _with_usage(request)), response)  # type: ignore[return-value]
        return body

    return router


def _note(
    answers: Answers, bundle: PolicyBundle | WrittenBundle, asked: Asked, *, as_asked: bool
) -> Note:
    names = bundle.label_names if isinstance(bundle, PolicyBundle) else ()
    return Note(
        bundle=bundle.bundle_id,
        guarantee=promise_of(answers, bundle, asked, as_asked=as_asked),
        answered_by=[decision.answered_by for decision in answers.decisions],
        confidence=[decision.confidence for decision in answers.decisions],
        probabilities=[probabilities_of(d, names) for d in answers.decisions],
    )


def _usage(answers: Answers) -> TokenUsage:
    read, written = answers.teacher_prompt_tokens, answers.teacher_output_tokens
    return TokenUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _with_usage(request: ChatRequest | CompletionRequest) -> bool:
    return bool(request.stream_options and request.stream_options.include_usage)


def _streamed(chunks: list[dict[str, Any]], response: Response) -> StreamingResponse:
    """Server-sent events, as OpenAI sends them, with the headers of the response they replace."""

    async def events() -> AsyncIterator[str]:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        events(), media_type="text/event-stream", headers=dict(response.headers)
    )


def _chat_chunks(chat: Chat, with_usage: bool) -> list[dict[str, Any]]:
    said = chat.choices[0]
    steps: list[dict[str, Any]] = [
        {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
        {"delta": {"content": said.message["content"]}, "logprobs": said.logprobs,
         "finish_reason": None},
        {"delta": {}, "logprobs": None, "finish_reason": said.finish_reason},
    ]  # fmt: skip
    choices = [[{"index": 0, **step}] for step in steps]
    return _chunks(chat, "chat.completion.chunk", choices, with_usage)


def _text_chunks(completion: Completion, with_usage: bool) -> list[dict[str, Any]]:
    choices = [[choice.model_dump()] for choice in completion.choices]
    return _chunks(completion, "text_completion", choices, with_usage)


def _chunks(
    body: Chat | Completion, kind: str, choices: list[list[dict[str, Any]]], with_usage: bool
) -> list[dict[str, Any]]:
    head = body.model_dump(include={"id", "created", "model", "system_fingerprint"})
    head |= {"object": kind} | ({"usage": None} if with_usage else {})
    chunks = [{**head, "choices": some} for some in choices]
    chunks[-1]["journeyman"] = body.journeyman.model_dump()
    if with_usage:
        chunks.append({**head, "choices": [], "usage": body.usage.model_dump()})
    return chunks
