"""Four times what the teacher, or the student, can take: every request gets an answer or a refusal,
and memory is flat."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from journeyman.student.models import Classifier
from tests.conftest import children
from tests.ray_head import until
from tests.serve import tiny
from tests.serve.conftest import Running
from tests.serve.test_scaling import with_settings

_TEXTS = 16  # a request; the queue holds 64
_LONG = 8  # times as long as those of other tests
_CLIENTS = 3  # that ask one request after the other and are not refused
_OVERLOAD = 4

_STUDENTS_RATE = 25  # texts a second of the slow student
_DEADLINE_S = 8.0  # of a request to it
_SOON_S = 3.0  # the queue takes half of the deadline


@pytest.mark.parametrize("seconds", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_at_four_times_the_sustainable_load_nothing_is_lost_and_accepted_texts_are_answered(
    cascade: Running, seconds: float
):
    hard, easy = long_and_escalated(cascade.run), cascade.run.accepted[0]
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

    before = memory()
    sustainable = asyncio.run(both())
    after = memory()
    print(f"{sustainable:.1f} requests/s are sustainable; of {_OVERLOAD} times as many {statuses}")
    assert set(statuses) == {("hard", 200), ("hard", 503), ("easy", 200)}, statuses
    assert statuses["hard", 200] >= sustainable * seconds / 4, "it answers what it can"
    check_flat(before, after)
    assert cascade.client.get("/v1/figures").json()["waiting"] == 0
    assert cascade.classify(hard).status_code == 200  # and it goes on as before


def long_and_escalated(run: tiny.Run) -> list[str]:
    """Texts on which the teacher is busy far longer than the student that passes them on: so the
    teacher's queue is the one that fills."""
    texts = [" ".join((tiny.TEXTS * 2)[i : i + _LONG]) for i in range(len(tiny.TEXTS))]
    logits = Classifier.load(run.folder / "student").logits(texts)
    found = [
        t
        for t, of in zip(texts, tiny.scores_of(logits), strict=True)
        if of <= run.bundle.accept_above
    ]
    return (found * _TEXTS)[:_TEXTS]


@pytest.fixture
def slow(
    cascade: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    """A cascade beside the other whose student takes its time, without the machine's."""
    from ray import serve

    from serve import app

    teacher, ingress = slow_classes()
    actor: Callable[..., Any] = app._actor
    monkeypatch.setattr(app, "Teacher", teacher)
    monkeypatch.setattr(app, "Ingress", ingress)
    monkeypatch.setattr(app, "_actor", lambda settings, *_: actor(settings, 0))
    bundle = with_settings(cascade.run, tmp_path, request_timeout_s=_DEADLINE_S)
    serve.run(app.build(bundle), name="slow", route_prefix="/slow")
    try:
        with httpx.Client(base_url=f"{cascade.url}/slow", timeout=60) as client:
            until(lambda: client.get("readyz").status_code == 200, 30)
            yield client
    finally:
        serve.delete("slow")


def slow_classes() -> tuple[type, type]:
    """Of an idle teacher and an ingress; pickled whole, as classes of a function are."""
    from serve.ingress import Ingress
    from serve.students import Encoders
    from serve.teacher import Teacher

    class IdleTeacher(Teacher):
        def __init__(self, *_: Any, **__: Any) -> None:
            self._engine: Any = SimpleNamespace(alive=True, close=lambda: None)
            self._failure = None

    class SlowEncoders(Encoders):
        def decide(self, texts: Sequence[str], stage: int = 0) -> Any:
            time.sleep(len(texts) / _STUDENTS_RATE)
            return super().decide(texts, stage)

    class SlowIngress(Ingress):
        def _student(self, loaded: Any, readers: Any, rule: Any) -> Any:
            return SlowEncoders(loaded, readers, rule)

    return IdleTeacher, SlowIngress


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [15, 120])
def test_at_four_times_what_the_student_can_take_the_rest_is_refused_at_once(
    cascade: Running, slow: httpx.Client, seconds: float
):
    """Requests of one text each, as most clients send them."""
    easy, base = cascade.run.accepted[0], str(slow.base_url)
    took: list[tuple[int, float]] = []  # status, seconds
    looked: list[float] = []

    async def ask(client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        response = await client.post("v1/classify", json={"input": easy})
        took.append((response.status_code, time.monotonic() - began))
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "student_queue_full", response.text
            assert 1 <= int(response.headers["Retry-After"]) <= 60
        elif response.status_code == 200:
            assert response.json()["results"][0]["answered_by"] == "student"

    async def look(client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            for path in ("readyz", "v1/figures"):
                began = time.monotonic()
                assert (await client.get(path)).status_code == 200
                looked.append(time.monotonic() - began)
            await asyncio.sleep(0.5)

    async def flood() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
            began, per_s = time.monotonic(), _OVERLOAD * _STUDENTS_RATE
            async with asyncio.TaskGroup() as group:
                group.create_task(look(client, began + seconds))
                for number in range(round(per_s * seconds)):
                    await asyncio.sleep(began + number / per_s - time.monotonic())
                    group.create_task(ask(client))

    before = memory()
    asyncio.run(flood())
    check_flat(before, memory())
    statuses = Counter(status for status, _ in took)
    refused = [seconds for status, seconds in took if status == 503]
    print(f"{statuses}, refused within {max(refused):.2f} s, looks within {max(looked):.2f} s")
    assert set(statuses) == {200, 503}, statuses
    assert statuses[200] >= 0.7 * _STUDENTS_RATE * seconds, "it answers what it can"
    assert most(refused) < _SOON_S and most(looked) < _SOON_S
    assert slow.post("v1/classify", json={"input": easy}).status_code == 200


def most(seconds: list[float]) -> float:
    """Nine of ten took no longer; others may work on this machine."""
    return float(np.quantile(seconds, 0.9))


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


def memory() -> dict[int, int]:
    """Bytes of each replica, proxy and the controller."""
    of_serve = [*children("ServeReplica:cascade"), *children("ServeReplica:slow"),
                *children("ProxyActor"), *children("ServeController")]  # fmt: skip
    return {process.pid: process.memory_info().rss for process in of_serve}


def check_flat(before: dict[int, int], after: dict[int, int]) -> None:
    assert set(after) == set(before), "no process has ended, and none has been added"
    grown = {pid: (after[pid] - before[pid]) / 1e6 for pid in after}
    assert max(grown.values()) < 100 and sum(grown.values()) < 200, f"MB more by process: {grown}"
