"""OpenAI's endpoints in front of a cascade: the answer to a message is its label, or what is
written to it.

Streams begin once it is decided who answers, so no byte is ever taken back.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from journeyman.cascade.answering import Answers, Asked
from journeyman.cascade.policy import Decision
from journeyman.cascade.refusals import ColumnsRefused
from journeyman.certify.bundle import PolicyBundle
from serve import errors
from serve import openai_streams as streams
from serve.live import Live, Served
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
from serve.openai_streams import Growing
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

    def serving(texts: list[str]) -> Served:
        if live.bundle.columns != ("text",):
            raise ColumnsRefused(
                f"this cascade classifies rows of {', '.join(live.bundle.columns)}, which a prompt "
                "has no place for; ask /v1/classify."
            )
        return live.served(texts)

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The cascade, and each of its two models alone."""
        return ModelList(data=[ModelCard(id=name, created=since) for name in _MODELS])

    @router.get("/v1/models/{name}", responses={404: errors.described("There is no such model.")})
    async def model(name: str) -> ModelCard:
        """One of them."""
        for known in _MODELS:
            if name == known:
                return ModelCard(id=known, created=since)
        raise HTTPException(404, f"no such model; there are {', '.join(_MODELS)}")

    @router.post("/v1/chat/completions", responses=_RESPONSES)
    async def chat(request: ChatRequest, response: Response) -> Chat:
        """Answer a user's message, with its label where the cascade classifies."""
        texts = [request.messages[0].text]
        served = serving(texts)
        answering = served.answering.answer(texts, request.model)
        if not request.stream or request.logprobs or isinstance(served.bundle, PolicyBundle):
            answers = await answering
        else:
            growing = Growing(answering)
            if begun := await growing.begun():
                return _growing(growing, begun, served, request)  # type: ignore[return-value]
            answers = await growing.whole
        body, headers = _chat(answers, served, request)
        if request.stream:
            return streams.whole(streams.chat_chunks(body, request), headers)  # type: ignore[return-value]
        response.headers.update(headers)
        return body

    @router.post("/v1/completions", responses=_RESPONSES)
    async def completions(request: CompletionRequest, response: Response) -> Completion:
        """Answer one prompt or several, with their labels where the cascade classifies."""
        served = serving(request.texts)
        bundle, answers = served.bundle, await served.answering.answer(request.texts, request.model)
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
            journeyman=_note(answers, served, request, as_asked=whole),
        )
        response.headers.update(headers_of(answers, served, request.model, as_asked=whole))
        if request.stream:
            return streams.whole(streams.text_chunks(body, request), response.headers)  # type: ignore[return-value]
        return body

    return router


def _chat(answers: Answers, served: Served, request: ChatRequest) -> tuple[Chat, dict[str, str]]:
    """The answer to a message, and its headers."""
    answer = said(answers.decisions[0], served.bundle, request)
    logprobs = answer.chat_logprobs(request.top_logprobs or 0) if request.logprobs else None
    choice = ChatChoice(
        index=0,
        finish_reason=answer.finish_reason,
        logprobs=logprobs,
        message={"role": "assistant", "content": answer.text, "refusal": None},
    )
    body = Chat(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        choices=[choice],
        usage=_usage(answers),
        system_fingerprint=served.bundle.bundle_id,
        journeyman=_note(answers, served, request, as_asked=answer.whole),
    )
    return body, headers_of(answers, served, request.model, as_asked=answer.whole)


def _growing(
    growing: Growing, begun: Decision, served: Served, request: ChatRequest
) -> StreamingResponse:
    """Its headers promise nothing where the answer may be cut, which its last chunk knows."""
    never_cut = not request.stops and request.limit is None
    headers = headers_of(Answers(decisions=(begun,)), served, request.model, as_asked=never_cut)
    return streams.as_it_grows(
        growing,
        lambda decision: said(decision, served.bundle, request).text,
        lambda answers: _chat(answers, served, request)[0],
        request,
        headers,
    )


def _note(
    answers: Answers, served: Served, request: ChatRequest | CompletionRequest, *, as_asked: bool
) -> Note:
    bundle, decisions = served.bundle, answers.decisions
    names = bundle.label_names if isinstance(bundle, PolicyBundle) else ()
    return Note(
        bundle=bundle.bundle_id,
        guarantee=promise_of(answers, served, request.model, as_asked=as_asked),
        answered_by=[decision.answered_by for decision in decisions],
        confidence=[decision.confidence for decision in decisions],
        stage=[decision.stage for decision in decisions],
        probabilities=[probabilities_of(decision, names) for decision in decisions],
        ignored=request.ignored(has_tokens=any(d.written and d.written.tokens for d in decisions)),
    )


def _usage(answers: Answers) -> TokenUsage:
    read, written = answers.teacher_prompt_tokens, answers.teacher_output_tokens
    return TokenUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
