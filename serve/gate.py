"""In front of all endpoints: who may ask, how often, and how much at once.

An ASGI middleware: it decides before a body is read or parsed.
"""

from __future__ import annotations

import math

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from journeyman.cascade.keys import Keyring
from serve import errors
from serve.schema import MAX_CHARACTERS, MAX_TEXTS

# As many of the longest texts as a request may have, of one byte a character on average, once more
# for escapes.
MAX_BODY_BYTES = 2 * MAX_TEXTS * MAX_CHARACTERS


class Gate:
    """Refuses with 401, 413 or 429. keyring: None lets everyone in."""

    def __init__(
        self, app: ASGIApp, keyring: Keyring | None, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self._app, self._keyring, self._max_body_bytes = app, keyring, max_body_bytes
        self._too_large = f"the body has more than {max_body_bytes:,} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope["path"], headers):
            return await refusal(scope, receive, send)
        await self._app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            return errors.response(413, *errors.TOO_LARGE, self._too_large)
        if self._keyring is None or not path.startswith("/v1/"):
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
        return None

    def _counted(self, receive: Receive) -> Receive:
        """Reads no more of a body than may be, whatever its headers said of its length."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted
