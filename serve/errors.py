"""Errors as words and codes, in OpenAI's form. What was sent stays out of them: texts must not
reach logs that keep error messages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from journeyman.cascade.refusals import (
    ColumnsRefused,
    DeadlinePassed,
    NoClasses,
    Overloaded,
    Refusal,
    StudentOverloaded,
    StudentUnavailable,
    TeacherAway,
    TeacherStarting,
    TeacherUnavailable,
    TextRefused,
)
from serve.failures import failed
from serve.schema import MAX_TEXTS, ErrorAnswer, ErrorBody

# Status, type, code and headers of each refusal. The OpenAI client sends 5xx again twice unless
# x-should-retry forbids it; a deadline that passed would only pass again, under more load.
_REFUSALS: dict[type[Refusal], tuple[int, str, str, dict[str, str]]] = {
    ColumnsRefused: (422, "invalid_request_error", "wrong_columns", {}),
    NoClasses: (400, "invalid_request_error", "no_classes", {}),
    TextRefused: (400, "invalid_request_error", "text_refused", {}),
    Overloaded: (503, "overloaded", "teacher_queue_full", {}),
    StudentOverloaded: (503, "overloaded", "student_queue_full", {}),
    StudentUnavailable: (503, "unavailable", "student_unavailable", {}),
    TeacherUnavailable: (503, "unavailable", "teacher_unavailable", {}),
    TeacherAway: (503, "unavailable", "teacher_unavailable", {}),
    TeacherStarting: (503, "unavailable", "teacher_starting", {}),
    DeadlinePassed: (504, "timeout", "deadline_passed", {"x-should-retry": "false"}),
}
_SAID = 5  # of all that is wrong with a body
_OF_ANOTHER_BRANCH = ("string_type", "list_type", "dict_type")
_NO_JSON = "the body is no JSON object (with Content-Type: application/json)"
TOO_LARGE = ("invalid_request_error", "body_too_large")
# Headers of errors, for OpenAPI.
RETRY_AFTER = {"Retry-After": "Seconds until it may be asked again."}
NEVER_RETRY = {"x-should-retry": "false where the same request would only fail again."}


def described(what: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Of an error, for OpenAPI; headers: what each one that it may carry says."""
    return {
        "description": what,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}},
        },
        "headers": {
            name: {"description": says, "schema": {"type": "string"}}
            for name, says in (headers or {}).items()
        },
    }


DESCRIBED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong, or a text is too long."},
    422: {"model": ErrorAnswer, "description": "The bundle needs other columns."},
    503: described("The teacher or the student is away, or too much waits for it.", RETRY_AFTER),
    504: described("Not answered within the deadline.", NEVER_RETRY),
}


def add_handlers(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """bodies: what each path takes, to name the known fields where one is unknown."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        status, kind, code, headers = _REFUSALS[type(error)]
        if error.retry_after_s is not None:
            headers = headers | {"Retry-After": str(math.ceil(error.retry_after_s))}
        return response(status, kind, code, str(error), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        body = bodies.get(request.scope["route"].path)
        sentence = _sentence(error, tuple(body.model_fields) if body else ())
        return response(400, "invalid_request_error", "invalid_request", sentence)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 413:
            return response(413, *TOO_LARGE, str(error.detail))
        if error.status_code == 408:
            return response(408, "timeout", "body_too_slow", str(error.detail))
        if error.status_code == 400:  # FastAPI's, of a body in another encoding, or too deep
            return response(400, "invalid_request_error", "invalid_request", f"{_NO_JSON}.")
        message = f"{request.method} {request.url.path}: {error.detail}; see /docs."
        return response(error.status_code, "invalid_request_error", "no_such_route", message)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, so that it reaches Serve's log, without its
        # words (see Gate).
        message = f"the server failed ({failed(error).kind}); its log says more."
        return response(500, "server_error", "internal_error", message)


def body_of(refusal: Refusal) -> dict[str, Any]:
    """Of an answer that is under way, and can have no status any more."""
    _, kind, code, _ = _REFUSALS[type(refusal)]
    said: dict[str, Any] = ErrorAnswer(
        error=ErrorBody(message=str(refusal), type=kind, code=code)
    ).model_dump()
    return said


def response(
    status: int, kind: str, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    body = ErrorAnswer(error=ErrorBody(message=message, type=kind, code=code))
    return JSONResponse(body.model_dump(), status, headers)


def _sentence(error: RequestValidationError, known: tuple[str, ...]) -> str:
    """What is wrong, without what was sent."""
    # pydantic tells of each branch of `input`, a text, an object or a list; the one meant says more
    # than that another's type is wrong.
    problems = error.errors()
    kinds = [p for p in problems if p["type"] not in _OF_ANOTHER_BRANCH] or problems
    words = dict.fromkeys(_words(problem, known) for problem in kinds)
    return "; ".join(itertools.islice(words, _SAID)) + "."


def _words(problem: Mapping[str, Any], known: tuple[str, ...]) -> str:
    location, kind = problem["loc"][1:], problem["type"]
    said = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error" and not location:  # of the body as a whole
        return said
    if kind == "json_invalid" or not location:
        return _NO_JSON
    where = _where(location)
    if kind == "extra_forbidden":
        return f"unknown field {where}; known are {', '.join(known)}"
    if kind == "string_pattern_mismatch":
        return f"{where} is blank"
    if kind in _OF_ANOTHER_BRANCH and location[0] in ("input", "prompt"):
        columns = " (or objects of the bundle's columns)" if location[0] == "input" else ""
        return f"{location[0]} must be a text, or a list of 1 to {MAX_TEXTS} texts{columns}"
    return f"{where}: {said[0].lower()}{said[1:]}"


def _where(location: tuple[str | int, ...]) -> str:
    """The place in a body: a text by its number, a message by its path."""
    if location[0] in ("input", "prompt"):
        numbers = [part for part in location if isinstance(part, int)]
        return f"text {numbers[0]}" if numbers else str(location[0])
    return ".".join(str(part) for part in location if part not in ("str", "Part"))
