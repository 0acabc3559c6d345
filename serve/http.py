"""The HTTP interface of a cascade: routes, and errors as words and codes. No Ray in here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from journeyman.cascade.answering import Answers, Cascade
from journeyman.cascade.refusals import (
    DeadlinePassed,
    Overloaded,
    Refusal,
    TeacherUnavailable,
    TextRefused,
)
from journeyman.certify.bundle import PolicyBundle
from serve.schema import (
    MAX_TEXTS,
    ClassifyAnswer,
    ClassifyRequest,
    ErrorAnswer,
    ErrorBody,
    Health,
    Result,
    Usage,
    bundle_card,
    promise,
)

# Status, type, code and headers of each refusal. The OpenAI client sends 5xx again twice unless
# x-should-retry forbids it; a deadline that passed would only pass again, under more load.
_REFUSALS: dict[type[Refusal], tuple[int, str, str, dict[str, str]]] = {
    TextRefused: (400, "invalid_request_error", "text_refused", {}),
    Overloaded: (503, "overloaded", "teacher_queue_full", {"Retry-After": "1"}),
    TeacherUnavailable: (503, "unavailable", "teacher_unavailable", {"Retry-After": "5"}),
    DeadlinePassed: (504, "timeout", "deadline_passed", {"x-should-retry": "false"}),
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong, or a text is too long."},
    503: {"model": ErrorAnswer, "description": "The teacher is away, or too much waits for it."},
    504: {"model": ErrorAnswer, "description": "Not answered within the deadline."},
}


def api(cascade: Cascade, bundle: PolicyBundle, unready: Callable[[], str | None]) -> FastAPI:
    """The application; unready: why the cascade is not ready yet, None if it is."""
    app = FastAPI(
        title="Journeyman cascade",
        description="A student answers what it is certified for, its teacher the rest.",
    )
    _add_error_handlers(app)
    guarantee, card = promise(bundle), bundle_card(bundle)

    @app.post("/v1/classify", responses=_ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyAnswer:
        """Classify one text, or several at once."""
        answers = await cascade.answer(request.texts, request.model)
        return ClassifyAnswer(
            id=f"classify-{uuid.uuid4().hex}",
            model=request.model,
            bundle=bundle.bundle_id,
            guarantee=guarantee if request.model == "cascade" else None,
            results=_results(answers, bundle.label_names),
            usage=_usage(answers),
        )

    @app.get("/healthz")
    async def healthz() -> Health:
        """200 while the process is up."""
        return Health(status="ok")

    @app.get("/readyz", responses={503: {"model": ErrorAnswer}})
    async def readyz() -> Health:
        """200 while student and teacher can answer; else 503 with the reason."""
        if reason := unready():
            raise TeacherUnavailable(reason)
        return Health(status="ready")

    @app.get("/v1/bundle")
    async def show_bundle() -> dict[str, Any]:
        """The policy bundle, without its cost-quality curve."""
        return card

    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Make the OpenAPI page, and take out FastAPI's own 422: a wrong request gets our 400."""
    schema = app.openapi()
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _results(answers: Answers, label_names: tuple[str, ...]) -> list[Result]:
    return [
        Result(
            label=decision.label,
            answered_by=decision.answered_by,
            confidence=decision.confidence,
            probabilities=dict(zip(label_names, decision.probabilities.tolist(), strict=True)),
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


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        status, kind, code, headers = _REFUSALS[type(error)]
        return _error(status, kind, code, str(error), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, "invalid_request_error", "invalid_request", _sentence(error))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}; see /docs."
        return _error(error.status_code, "invalid_request_error", "no_such_route", message)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, so that it reaches Serve's log.
        message = f"the server failed ({type(error).__name__}); its log says more."
        return _error(500, "server_error", "internal_error", message)


def _error(
    status: int, kind: str, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    body = ErrorAnswer(error=ErrorBody(message=message, type=kind, code=code))
    return JSONResponse(body.model_dump(), status, headers)


def _sentence(error: RequestValidationError) -> str:
    """What is wrong, without what was sent: texts stay out of logs that keep error messages."""
    # pydantic tells of both branches of `input`, a text or a list; the one meant says more than
    # that the other's type is wrong.
    problems = error.errors()
    kinds = [p for p in problems if p["type"] not in ("string_type", "list_type")] or problems
    return "; ".join(dict.fromkeys(_words(problem) for problem in kinds)) + "."


def _words(problem: Mapping[str, Any]) -> str:
    location, kind = problem["loc"][1:], problem["type"]
    place = next((part for part in location if isinstance(part, int)), None)
    where = f"text {place}" if place is not None else str(location[0]) if location else "the body"
    if kind == "json_invalid" or not location:
        return "the body is no JSON object (with Content-Type: application/json)"
    if kind == "extra_forbidden":
        return f"unknown field {where}; known are {', '.join(ClassifyRequest.model_fields)}"
    if kind == "string_pattern_mismatch":
        return f"{where} is blank"
    if kind in ("string_type", "list_type"):
        return f"input must be a text, or a list of 1 to {MAX_TEXTS} texts"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
