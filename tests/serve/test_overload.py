"""Four times what the teacher can take: every request gets an answer or a refusal, and memory is
flat."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx
import psutil
import pytest

from tests.conftest import children
from tests.serve.conftest import Running

_TEXTS = 16  # a request; the queue holds 64
_CLIENTS = 3  # that ask one request after the other and are not refused
_OVERLOAD = 4


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_at_four_times_the_sustainable_load_nothing_is_lost_and_accepted_texts_are_answered(
    cascade: Running, seconds: float
):
    hard, easy = (cascade.run.escalated[:_TEXTS] * _TEXTS)[:_TEXTS], cascade.run.accepted[0]
    statuses: Counter[tuple[str, int]] = Counter()

    async def ask(client: httpx.AsyncClient) -> int:
        response = await client.post("/v1/classify", json={"input": hard})
        if response.status_code == 503:
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            assert response.json()["error"]["code"] == "teacher_queue_full"
        elif response.status_code == 200:
            assert len(response.json()["results"]) == _TEXTS
        return response.status_code

    async def drip(client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            response = await client.post("/v1/classify", json={"input": easy})
            statuses["easy", response.status_code] += 1
            assert response.json()["results"][0]["answered_by"] == "student"

    async def flood(client: httpx.AsyncClient, per_s: float) -> None:
        """Whatever comes back, the next request goes out at its time."""

        async def one() -> None:
            statuses["hard", await ask(client)] += 1

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(drip(client, began + seconds))
            for number in range(round(per_s * seconds)):
                await asyncio.sleep(began + number / per_s - time.monotonic())
                group.create_task(one())

    async def both() -> float:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cascade.url, timeout=60, limits=limits) as client:
            sustainable = await rate(lambda: ask(client), min(seconds / 4, 10))
            await flood(client, _OVERLOAD * sustainable)
            return sustainable

    before = {process.pid: process.memory_info().rss for process in of_serve()}
    sustainable = asyncio.run(both())
    after = {process.pid: process.memory_info().rss for process in of_serve()}
    print(f"{sustainable:.1f} requests/s are sustainable; of {_OVERLOAD} times as many {statuses}")
    assert set(statuses) == {("hard", 200), ("hard", 503), ("easy", 200)}, statuses
    assert statuses["hard", 200] >= sustainable * seconds / 4, "it answers what it can"
    assert set(after) == set(before), "no process has ended, and none has been added"
    grown = {pid: (after[pid] - before[pid]) / 1e6 for pid in after}
    assert max(grown.values()) < 100 and sum(grown.values()) < 200, f"MB more by process: {grown}"
    assert cascade.client.get("/v1/figures").json()["waiting"] == 0
    assert cascade.classify(hard).status_code == 200  # and it goes on as before


async def rate(ask: Callable[[], Awaitable[int]], seconds: float) -> float:
    """Requests a second that are answered, one after the other by a few clients."""
    began, answered = time.monotonic(), 0

    async def client() -> None:
        nonlocal answered
        while time.monotonic() < began + seconds:
            assert await ask() == 200
            answered += 1

    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    return answered / (time.monotonic() - began)


def of_serve() -> list[psutil.Process]:
    """Replicas, proxies and the controller."""
    return [*children("ServeReplica:cascade"), *children("ProxyActor"),
            *children("ServeController")]  # fmt: skip
