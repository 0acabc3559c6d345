"""More than the teacher can take: every request gets an answer or a refusal, and memory is flat."""

import asyncio
import time
from collections import Counter

import httpx
import psutil
import pytest

from tests.conftest import children
from tests.serve.conftest import Running

_TEXTS = 16  # a request; the queue holds 64
_CLIENTS = 24


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_under_overload_nothing_is_lost_and_accepted_texts_are_answered(
    cascade: Running, seconds: float
):
    hard, easy = cascade.run.escalated[:_TEXTS], cascade.run.accepted[0]
    hard = (hard * _TEXTS)[:_TEXTS]
    statuses: Counter[tuple[str, int]] = Counter()
    replicas = children("ServeReplica:cascade")
    before = sum(memory(replica) for replica in replicas)
    until = time.monotonic() + seconds

    async def flood(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            response = await client.post("/v1/classify", json={"input": hard})
            statuses["hard", response.status_code] += 1
            if response.status_code == 503:
                assert 1 <= int(response.headers["Retry-After"]) <= 60
                assert response.json()["error"]["code"] == "teacher_queue_full"
            else:
                assert len(response.json()["results"]) == _TEXTS

    async def drip(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            response = await client.post("/v1/classify", json={"input": easy})
            statuses["easy", response.status_code] += 1
            assert response.json()["results"][0]["answered_by"] == "student"

    async def both() -> None:
        limits = httpx.Limits(max_connections=2 * _CLIENTS)
        async with httpx.AsyncClient(base_url=cascade.url, timeout=60, limits=limits) as client:
            await asyncio.gather(drip(client), *(flood(client) for _ in range(_CLIENTS)))

    asyncio.run(both())
    assert set(statuses) == {("hard", 200), ("hard", 503), ("easy", 200)}, statuses
    grown = sum(memory(replica) for replica in replicas) - before
    assert grown < 200e6, f"{grown / 1e6:.0f} MB more"
    assert cascade.client.get("/v1/figures").json()["waiting"] == 0
    assert cascade.classify(hard).status_code == 200  # and it goes on as before


def memory(process: psutil.Process) -> int:
    return process.memory_info().rss
