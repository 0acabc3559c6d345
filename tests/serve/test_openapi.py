"""What the endpoints answer is what their OpenAPI document says of them: no more and no less."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import jsonschema
import pytest

from journeyman.cascade.budgets import Lent, Purse
from journeyman.cascade.refusals import DeadlinePassed, Overloaded, TextRefused
from serve import gate
from serve.http import api
from tests.serve import tiny
from tests.serve.test_gate import HASH, KEY, bearer, ring
from tests.serve.test_openai import Cascade

BODIES: dict[str, dict[str, Any]] = {
    "/v1/classify": {"input": "x"},
    "/v1/chat/completions": {
        "model": "cascade",
        "messages": [{"role": "user", "content": "x"}],
    },
    "/v1/completions": {"model": "cascade", "prompt": "x"},
}
OF_KEYS = ("/v1/bundle", "/v1/figures", "/v1/models", "/v1/models/{name}")
OPEN = ("/healthz", "/readyz")
TOLD = ("retry-after", "x-should-retry", "www-authenticate")  # of an error, beside its body


async def slow() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.sleep(30)


class Answered:
    """Answers by endpoint, each held against the document of the application that gave it."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.described: dict[tuple[str, str], set[str]] = {}

    def ask(
        self, bundle, method: str, path: str, keys: bool = True, error=None, unready=None,
        per_minute: int | None = None, spent: bool = False, **request: Any,
    ) -> None:  # fmt: skip
        purse = Purse({HASH: 5.0})
        today = datetime.now(UTC).date().isoformat()
        used_up = frozenset({HASH} if spent else ())
        purse.settled({}, Lent(leases={HASH: 0.0 if spent else 5.0}, used_up=used_up, day=today))
        live = tiny.live(Cascade(error), bundle)  # type: ignore[arg-type]
        app = api(live, lambda: unready, ring(per_minute) if keys else None, purse)
        request.setdefault("headers", bearer(KEY))
        url = path.format(name=request.pop("name", "student"))

        async def call() -> tuple[list[httpx.Response], dict]:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
                times = 1 + (per_minute or 0)
                answers = [await client.request(method, url, **request) for _ in range(times)]
                return answers, (await client.get("/openapi.json")).json()

        answers, document = asyncio.run(call())
        operation = document["paths"][path][method.lower()]
        self.described[method, path] = set(operation["responses"])
        for answer in answers:
            self._hold(answer, operation, document)
            self.statuses[method, path].add(str(answer.status_code))

    def _hold(self, answer: httpx.Response, operation: dict, document: dict) -> None:
        described = operation["responses"][str(answer.status_code)]
        told = {name for name in TOLD if name in answer.headers}
        assert told <= {name.lower() for name in described.get("headers", {})}
        schema = described["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), schema | {"components": document["components"]})


@pytest.fixture(scope="module")
def bundle(run: tiny.Run):
    return run.bundle


@pytest.fixture
def answered(bundle, monkeypatch: pytest.MonkeyPatch) -> Answered:
    """Every way in which an endpoint can end, on each endpoint that knows it."""
    monkeypatch.setattr(gate, "_BODY_S", 0.2)
    found = Answered()
    pairs = bundle.model_copy(update={"columns": ("passage", "text")})
    for path, body in BODIES.items():
        for more in (
            {},
            {"json": {"surprise": 1}},
            {"headers": {}},
            {"per_minute": 1},
            {"spent": True},
            {"content": slow()},
            {"content": b"{}", "headers": bearer(KEY) | {"Content-Length": "9" * 12}},
            {"error": TextRefused(0, "too long")},
            {"error": Overloaded("too many", 3.2)},
            {"error": DeadlinePassed("late")},
        ):
            found.ask(
                bundle, "POST", path, **({"json": body} if "content" not in more else {}) | more
            )
        found.ask(pairs, "POST", path, json=body)
    for path in (*OF_KEYS, *OPEN):
        found.ask(bundle, "GET", path)
        found.ask(bundle, "GET", path, headers=bearer(KEY) | {"Content-Length": "9" * 12})
    for path in OF_KEYS:
        found.ask(bundle, "GET", path, headers={})
        found.ask(bundle, "GET", path, per_minute=1)
        found.ask(bundle, "GET", path, spent=True)
    found.ask(bundle, "GET", "/v1/models/{name}", name="gpt-5")
    found.ask(bundle, "GET", "/readyz", unready="the teacher is starting")
    return found


def test_each_endpoint_answers_with_the_statuses_and_headers_that_its_description_names(answered):
    assert answered.statuses == answered.described


def test_where_nobody_needs_a_key_none_is_described(bundle):
    found = Answered()
    for path, body in BODIES.items():
        found.ask(bundle, "POST", path, keys=False, json=body, headers={})
    found.ask(bundle, "GET", "/v1/bundle", keys=False, headers={})
    for described in found.described.values():
        assert not {"401", "429"} & described


def test_the_document_says_how_a_key_is_sent_and_where_none_is_needed(bundle):
    app = api(tiny.live(Cascade(), bundle), lambda: None, ring())  # type: ignore[arg-type]
    document = app.openapi()
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"}
    }
    for path in (*BODIES, *OF_KEYS):
        [operation] = document["paths"][path].values()
        assert operation["security"] == [{"key": []}]
    for path in OPEN:
        assert "security" not in document["paths"][path]["get"]
