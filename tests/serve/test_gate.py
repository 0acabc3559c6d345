"""In front of the endpoints: keys, rates, sizes. No Ray."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest

from journeyman.cascade import keys
from journeyman.cascade.budgets import Lent, Purse, paying
from journeyman.cascade.keys import Key, Keyring
from serve.gate import MAX_BODY_BYTES
from serve.http import api
from tests.serve import tiny
from tests.serve.test_openai import Cascade

KEY = keys.new_key()
HASH = keys.line_of("shop", KEY, None).split()[1].removeprefix("sha256:")

TODAY = datetime.now(UTC).date().isoformat()


@pytest.fixture(scope="module")
def bundle(run: tiny.Run):
    return run.bundle


def ring(per_minute: int | None = None) -> Keyring:
    key = Key(name="shop", sha256=HASH, per_minute=per_minute, dollars_per_day=5.0)
    return Keyring((key,), time.monotonic)


def send(
    bundle, keyring: Keyring | None, *requests: dict, purse: Purse | None = None
) -> list[httpx.Response]:
    live = tiny.live(Cascade(), bundle)  # type: ignore[arg-type]
    app = api(live, lambda: None, keyring, purse)

    async def call() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            return [
                await client.request(**{"method": "POST", "url": "/v1/classify"} | request)
                for request in requests
            ]

    return asyncio.run(call())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_who_has_a_key_may_ask(bundle):
    body = {"json": {"input": "x"}}
    good, none, wrong, basic = send(
        bundle,
        ring(),
        body | {"headers": bearer(KEY)},
        body,
        body | {"headers": bearer(KEY[:-1])},
        body | {"headers": {"Authorization": f"Basic {KEY}"}},
    )
    assert good.status_code == 200
    for refused in (none, wrong, basic):
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["WWW-Authenticate"] == "Bearer"


def test_every_endpoint_wants_a_key_but_probes_and_pages(bundle):
    open_to_all = ("/healthz", "/readyz", "/", "/docs", "/openapi.json")
    paths = (*open_to_all, "/v1/bundle", "/v1/figures", "/v1/models", "/v1/chat/completions")
    responses = send(bundle, ring(), *({"method": "GET", "url": path} for path in paths))
    assert [r.status_code for r in responses] == [200] * 5 + [401] * 4


def test_a_route_prefix_opens_nothing(bundle):
    """Serve leaves the path whole and names the prefix beside it."""
    live = tiny.live(Cascade(), bundle)  # type: ignore[arg-type]
    app = api(live, lambda: None, ring(), None)

    async def call() -> list[int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path="/cascade")
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            paths = ["/cascade/v1/classify", "/v1/classify", "/cascade/v1/models"]
            asked = [await client.post(path, json={"input": "x"}) for path in paths]
            open_ = [await client.get(f"/cascade{path}") for path in ("/healthz", "/")]
            return [response.status_code for response in (*asked, *open_)]

    assert asyncio.run(call()) == [401, 401, 401, 200, 200]


def test_without_keys_everyone_may_ask(bundle):
    [response] = send(bundle, None, {"json": {"input": "x"}})
    assert response.status_code == 200


def test_who_asks_too_often_is_told_when_to_come_back(bundle):
    request = {"json": {"input": "x"}, "headers": bearer(KEY)}
    *answered, refused = send(bundle, ring(per_minute=3), *[request] * 4)
    assert [r.status_code for r in answered] == [200] * 3
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 20


def test_a_body_that_is_too_large_is_not_read(bundle):
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(10_000):
            read += 1 << 20
            yield b" " * (1 << 20)

    announced, streamed = send(
        bundle,
        None,
        {"content": b"{}", "headers": {"Content-Length": str(MAX_BODY_BYTES + 1)}},
        {"content": body()},
    )
    for response in (announced, streamed):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert f"more than {MAX_BODY_BYTES:,} bytes" in response.json()["error"]["message"]
    assert read <= MAX_BODY_BYTES + (2 << 20)


def test_a_key_that_has_spent_its_budget_waits_for_midnight(bundle):
    purse, ask = Purse({HASH: 5.0}), {"json": {"input": "x"}, "headers": bearer(KEY)}
    purse.settled({}, Lent(leases={HASH: 2.5}, day=TODAY))
    [fine] = send(bundle, ring(), ask, purse=purse)
    assert fine.status_code == 200
    purse.settled({}, Lent(leases={HASH: 0.0}, used_up=frozenset({HASH}), day=TODAY))
    [spent] = send(bundle, ring(), ask, purse=purse)
    assert spent.status_code == 429 and 0 < int(spent.headers["Retry-After"]) <= 86_400
    assert spent.headers["x-should-retry"] == "false"
    assert spent.json()["error"]["code"] == "budget_used_up"
    assert spent.json()["error"]["message"] == "the key shop has spent its 5 dollars of today."


def test_a_key_whose_budget_is_left_in_the_ledger_is_asked_to_come_again_at_once(bundle):
    """Nothing is settled yet; this replica's lease is spent, or a lost one still has all; the day
    is a new one."""
    ask = {"json": {"input": "x"}, "headers": bearer(KEY)}
    spent, without, yesterday = Purse({HASH: 5.0}), Purse({HASH: 5.0}), Purse({HASH: 5.0})
    spent.settled({}, Lent(leases={HASH: 2.5}, day=TODAY))
    spent.pay(HASH, 2.5)
    without.settled({}, Lent(leases={HASH: 0.0}, day=TODAY))
    used_up = frozenset({HASH})
    yesterday.settled({}, Lent(leases={HASH: 0.0}, used_up=used_up, day="2024-02-29"))
    for purse in (Purse({HASH: 5.0}), spent, without, yesterday):
        [refused] = send(bundle, ring(), ask, purse=purse)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "2"
        assert refused.json()["error"]["code"] == "budget_not_settled"
        assert "x-should-retry" not in refused.headers


def test_a_request_knows_whose_it_is(bundle):
    seen = []

    class Watching(Cascade):
        async def answer(self, texts, asked="cascade"):
            seen.append(paying.get())
            return await super().answer(texts, asked)

    app = api(tiny.live(Watching(), bundle), lambda: None, ring())  # type: ignore[arg-type]

    async def call() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            await client.post("/v1/classify", json={"input": "x"}, headers=bearer(KEY))

    asyncio.run(call())
    assert seen == [HASH] and paying.get() is None
