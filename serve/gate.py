"""In front of all endpoints: who may ask, how often, and how much at once.

An ASGI middleware: it decides before a body is read or parsed.
"""

from __future__ import annotations

import asyncio
import math
import string
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote_from_bytes

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from journeyman.cascade.budgets import Purse, paying
from journeyman.cascade.keys import Key, Keyring
from serve import errors
from serve.failures import without_words
from serve.schema import MAX_CHARACTERS, MAX_TEXTS

# As many of the longest texts as a request may have, of one byte a character on average, once more
# for escapes.
MAX_BODY_BYTES = 2 * MAX_TEXTS * MAX_CHARACTERS


# What anybody may see, with keys too: the page, what describes the endpoints, and the probes.
_OPEN = {"", "/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/healthz",
         "/readyz"}  # fmt: skip
_SETTLED_IN_S = "2"  # replicas settle every second
_BODY_S = 60.0  # for a whole body to arrive


def is_open(path: str) -> bool:
    """Whether anybody may see it, with keys too."""
    return path in _OPEN


def described(path: str, *, has_body: bool, has_keys: bool) -> dict[str, Any]:
    """What the gate answers there in place of the route, for OpenAPI: by status."""
    found = {"413": errors.described("The body has too many bytes, read or announced.")}
    if has_body:
        found["408"] = errors.described(f"The body took longer than {_BODY_S:g} s.")
    if has_keys and not is_open(path):
        found["401"] = errors.described(
            "No API key, or an unknown one.", {"WWW-Authenticate": "Bearer, the scheme of keys."}
        )
        found["429"] = errors.described(
            "More requests a minute than the key has, or its budget of the day is spent, or that "
            "is not settled yet.",
            errors.RETRY_AFTER | errors.NEVER_RETRY,
        )
    return found


class Gate:
    """Refuses with 401, 413 or 429, and raises Failed for what nobody caught.

    keyring: None lets everyone in; purse: of keys with budgets.
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring | None,
        purse: Purse | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._app, self._keyring, self._purse = app, keyring, purse
        self._max_body_bytes = max_body_bytes
        self._too_large = f"the body has more than {max_body_bytes:,} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        query = scope["query_string"]
        if not query.isascii():  # which Starlette could not read where it makes a URL of it
            scope = {**scope, "query_string": quote_from_bytes(query, string.punctuation).encode()}
        headers = Headers(scope=scope)
        if refusal := self._refusal(_route_path(scope), headers):
            return await refusal(scope, receive, send)
        await without_words(self._app(scope, self._counted(receive), send))

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        announced = headers.get("content-length", "0")
        # Not int, which has a limit of its own on digits.
        if announced.isdecimal() and float(announced) > self._max_body_bytes:
            return errors.response(413, *errors.TOO_LARGE, self._too_large)
        if self._keyring is None or is_open(path):
            return None
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        key = self._keyring.find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            sentence = "no API key, or an unknown one; send it as Authorization: Bearer KEY."
            challenge = {"WWW-Authenticate": "Bearer"}
            return errors.response(
                401, "authentication_error", "invalid_api_key", sentence, challenge
            )
        if wait_s := self._keyring.wait_s(key):
            sentence = f"more than {key.per_minute} requests a minute with the key {key.name}."
            after = {"Retry-After": str(math.ceil(wait_s))}
            return errors.response(429, "rate_limit_error", "rate_limit_exceeded", sentence, after)
        if self._purse and not self._purse.may_pay(key.sha256):
            return _may_not_pay(key, self._purse)
        paying.set(key.sha256)  # for this request, which is a task of its own
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Reads no more of a body than may be, whatever its headers said of its length."""
        read, whole = 0, False
        until = asyncio.get_running_loop().time() + _BODY_S

        async def counted() -> Message:
            nonlocal read, whole
            try:  # behind the body only the client's leaving is waited for
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"no whole body within {_BODY_S:g} s.") from error
            whole = whole or not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted


def _route_path(scope: Scope) -> str:
    """Without the application's prefix, as routes see it."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _may_not_pay(key: Key, purse: Purse) -> JSONResponse:
    now = datetime.now(UTC)
    if not purse.is_used_up(key.sha256, now.date().isoformat()):
        sentence = (
            f"what the key {key.name} has spent today is not known yet, or its next dollars are "
            "being handed out; send this request again in some seconds."
        )
        after = {"Retry-After": _SETTLED_IN_S}
        return errors.response(429, "rate_limit_error", "budget_not_settled", sentence, after)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    seconds = (midnight - now).total_seconds()
    sentence = f"the key {key.name} has spent its {key.dollars_per_day:g} dollars of today."
    after = {"Retry-After": str(math.ceil(seconds)), "x-should-retry": "false"}
    return errors.response(429, "insufficient_quota", "budget_used_up", sentence, after)
