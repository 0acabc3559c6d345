"""Requests sent to a running cascade over HTTP, as a client would, and what came back.

Knows the endpoint and the rows; who started the server and what it is made of is not its matter.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from journeyman.errors import ClusterError

if TYPE_CHECKING:
    import httpx

_CLIENTS = 8
_BATCH_ROWS = 32
_REPEATS = 5  # of the student's pass, which takes a fraction of a second
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What was measured over HTTP.

    student_rows_per_s and teacher_rows_per_s: the same texts, two requests at a time of 32 rows
    each, of fewer where the teacher does not answer so many within a request's deadline; the
    student's is the median of five passes. The other figures: each text as a request of its
    own to the cascade, from eight clients.
    """

    requests: int
    answered_by_student: float  # share
    requests_per_s: float
    student_p50_ms: float | None  # requests that the student answered
    teacher_p50_ms: float | None  # requests that it escalated
    compared_rows: int
    student_rows_per_s: float
    teacher_rows_per_s: float
    labels: list[str]  # the cascade's answers, in the order of the texts

    def manifest(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "labels"}


Row = str | dict[str, str]  # a text, or an object of the columns that the bundle needs


def send(
    base_url: str, key: str, texts: Sequence[Row], compared: int, on_progress: Callable[[str], None]
) -> Traffic:
    """Send every text to the cascade, and the first ``compared`` to student and teacher alone.

    key: the API key. Raises ClusterError if a request is not answered.
    """
    return asyncio.run(_send(base_url, key, list(texts), compared, on_progress))


async def _send(
    base_url: str, key: str, texts: list[Row], compared: int, on_progress: Callable[[str], None]
) -> Traffic:
    import httpx

    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=_TIMEOUT_S) as client:
        on_progress("the teacher alone")
        same = texts[:compared]
        # Warms it up, by others where there are some: its cache would know these already.
        await _teachers_rows_per_s(client, (texts[compared:] or same)[:_BATCH_ROWS])
        await _rows_per_s(client, "student", same)
        teacher, batch = await _teachers_rows_per_s(client, same)
        on_progress("the student alone")
        student = statistics.median(
            [await _rows_per_s(client, "student", same, batch) for _ in range(_REPEATS)]
        )
        on_progress(f"{len(texts)} requests to the cascade")
        started = time.perf_counter()
        answers = await _each_alone(client, texts)
        elapsed = time.perf_counter() - started
    by = [(answer["results"][0]["answered_by"], ms) for answer, ms in answers]
    return Traffic(
        requests=len(texts),
        answered_by_student=sum(who == "student" for who, _ in by) / len(by),
        requests_per_s=len(texts) / elapsed,
        student_p50_ms=_median([ms for who, ms in by if who == "student"]),
        teacher_p50_ms=_median([ms for who, ms in by if who == "teacher"]),
        compared_rows=len(same),
        student_rows_per_s=student,
        teacher_rows_per_s=teacher,
        labels=[answer["results"][0]["label"] for answer, _ in answers],
    )


class _LateError(ClusterError):
    """A request took longer than its deadline."""


async def _teachers_rows_per_s(client: httpx.AsyncClient, texts: list[Row]) -> tuple[float, int]:
    """And in how many rows a request: a slow machine's teacher answers few in time."""
    batch = _BATCH_ROWS
    while True:
        try:
            return await _rows_per_s(client, "teacher", texts, batch), batch
        except _LateError:
            if batch == 1:
                raise
            batch = max(1, batch // 4)


async def _rows_per_s(
    client: httpx.AsyncClient, model: str, texts: list[Row], batch_rows: int = _BATCH_ROWS
) -> float:
    batches = [texts[i : i + batch_rows] for i in range(0, len(texts), batch_rows)]
    started = time.perf_counter()
    await _pool(2, [partial(_post, client, {"input": batch, "model": model}) for batch in batches])
    return len(texts) / (time.perf_counter() - started)


async def _each_alone(
    client: httpx.AsyncClient, texts: list[Row]
) -> list[tuple[dict[str, Any], float]]:
    async def timed(text: Row) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        answer = await _post(client, {"input": text})
        return answer, 1000 * (time.perf_counter() - started)

    return await _pool(_CLIENTS, [partial(timed, text) for text in texts])


async def _pool(size: int, requests: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """So many at a time; none is under way once one has failed."""
    slots = asyncio.Semaphore(size)

    async def run(request: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await request()

    tasks = [asyncio.ensure_future(run(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except ClusterError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    import httpx

    try:
        response = await client.post("/v1/classify", json=body)
    except httpx.HTTPError as error:
        raise ClusterError(
            f"{client.base_url}/v1/classify: no answer ({type(error).__name__}: {error}); look at "
            "Ray Serve's log files (/tmp/ray/session_latest/logs/serve)."
        ) from error
    if response.status_code != 200:
        failure = (
            _LateError if response.status_code == httpx.codes.GATEWAY_TIMEOUT else ClusterError
        )
        raise failure(
            f"{client.base_url}/v1/classify answered {response.status_code}: {response.text[:300]}"
        )
    return response.json()


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
