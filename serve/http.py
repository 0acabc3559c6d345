"""The HTTP interface of a cascade: our own endpoint, probes, and OpenAI's. No Ray in here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from journeyman.cascade.answering import Answers
from journeyman.cascade.budgets import Purse
from journeyman.cascade.keys import Keyring
from journeyman.cascade.refusals import NoClasses, TeacherUnavailable
from journeyman.certify.bundle import WrittenBundle
from serve import errors, gate, openai_routes
from serve.live import Live
from serve.openai_schema import ChatRequest, CompletionRequest
from serve.schema import (
    ANSWER_HEADERS,
    ClassifyAnswer,
    ClassifyRequest,
    Health,
    Result,
    Usage,
    bundle_card,
    headers_of,
    probabilities_of,
    promise_of,
)

_PAGE = Path(__file__).with_name("page.html")


def api(
    live: Live,
    unready: Callable[[], str | None],
    keyring: Keyring | None = None,
    purse: Purse | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The application; unready: why the cascade is not ready yet, None if it is; keyring: None
    lets everyone ask; purse: of keys that have a budget; cors_origins: of web pages that may ask
    from a browser."""
    app = FastAPI(
        title="Journeyman cascade",
        description="A student answers what it is certified for, its teacher the rest.",
    )
    bodies: dict[str, type[BaseModel]] = {
        "/v1/classify": ClassifyRequest,
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
    }
    errors.add_handlers(app, bodies)
    app.add_middleware(gate.Gate, keyring=keyring, purse=purse)
    if cors_origins:  # around the gate: a preflight has no key, and pages may read its refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*cors_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[*errors.RETRY_AFTER, *errors.NEVER_RETRY, *ANSWER_HEADERS],
        )
    app.include_router(openai_routes.routes(live))

    @app.post("/v1/classify", responses=errors.DESCRIBED)
    async def classify(request: ClassifyRequest, response: Response) -> ClassifyAnswer:
        """Classify one text, or several at once."""
        texts = request.texts(live.bundle.columns)
        served = live.served(texts)
        bundle = served.bundle
        if isinstance(bundle, WrittenBundle):
            raise NoClasses(
                "this cascade writes its answers; ask /v1/chat/completions or /v1/completions."
            )
        answers = await served.answering.answer(texts, request.model)
        response.headers.update(headers_of(answers, served, request.model))
        return ClassifyAnswer(
            id=f"classify-{uuid.uuid4().hex}",
            model=request.model,
            bundle=bundle.bundle_id,
            guarantee=promise_of(answers, served, request.model),
            results=_results(answers, bundle.label_names),
            usage=_usage(answers),
        )

    @app.get("/healthz")
    async def healthz() -> Health:
        """200 while the process is up."""
        return Health(status="ok")

    @app.get("/readyz", responses={503: errors.described("Something cannot answer yet.")})
    async def readyz() -> Health:
        """200 while student and teacher can answer; else 503 with the reason."""
        if reason := unready():
            raise TeacherUnavailable(reason)
        return Health(status="ready")

    @app.get("/v1/bundle")
    async def show_bundle() -> dict[str, Any]:
        """The policy bundle, without its cost-quality curve."""
        return bundle_card(live.bundle)

    @app.get("/v1/figures")
    async def show_figures() -> dict[str, Any]:
        """What all replicas that run answered: totals since each has the bundle, and the last
        minute. Failures, the stability of scores and texts that a shadow left out are those of
        the replica that answers this."""
        return live.figures()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    _document(app, has_keys=keyring is not None)
    return app


def _document(app: FastAPI, has_keys: bool) -> None:
    """Make the OpenAPI page: with what the gate answers, and without FastAPI's own 422, as a wrong
    request gets our 400."""
    schema = app.openapi()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            if responses.get("422", {}).get("description") == "Validation Error":
                del responses["422"]
            has_body = "requestBody" in operation
            responses |= gate.described(path, has_body=has_body, has_keys=has_keys)
            operation["responses"] = dict(sorted(responses.items()))
            if has_keys and not gate.is_open(path):
                operation["security"] = [{"key": []}]
    if has_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _results(answers: Answers, label_names: tuple[str, ...]) -> list[Result]:
    return [
        Result(
            label=decision.label,
            answered_by=decision.answered_by,
            confidence=decision.confidence,
            stage=decision.stage,
            probabilities=probabilities_of(decision, label_names),
        )
        for decision in answers.decisions
    ]


def _usage(answers: Answers) -> Usage:
    by_student = sum(d.answered_by == "student" for d in answers.decisions)
    return Usage(
        teacher_prompt_tokens=answers.teacher_prompt_tokens,
        teacher_output_tokens=answers.teacher_output_tokens,
        answered_by_student=by_student,
        answered_by_teacher=len(answers.decisions) - by_student,
    )
