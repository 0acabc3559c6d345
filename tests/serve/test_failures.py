"""What fails on a request may quote its text: its kind and place are told, its words are not."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayTaskError

from journeyman.cascade.refusals import TeacherUnavailable
from serve.asking import TeacherByHandle
from serve.failures import Failed
from serve.http import api
from serve.student_replicas import Student
from tests.serve import tiny
from tests.serve.conftest import Running
from tests.serve.test_openai_written import BUNDLE
from tests.serve.test_teacher import ASKED_OF_JUDGE, replica
from tests.serve.test_writers import ASKED, key, loaded

SECRET = "xyzzy-4711"


def told(error: BaseException) -> str:
    """All that a log would have of it, and a pickle take along."""
    chained = [repr(one) for one in (error.__cause__, error.__context__) if one]
    return "".join([*traceback.format_exception(error), repr(vars(error)), *chained])


async def fails(row: Any, *_: Any) -> Any:
    try:
        raise ValueError(f"cannot read {row}")
    except ValueError as error:
        raise KeyError(str(row)) from error


@pytest.mark.parametrize("call", ["label", "speak", "judge", "student"])
def test_a_replica_tells_the_kind_and_the_place_of_what_failed_in_it(
    call: str, monkeypatch: pytest.MonkeyPatch
):
    async def scenario() -> BaseException:
        sick = replica(monkeypatch, fails, ASKED)
        asked = {
            "label": lambda: sick.label([SECRET, "y"]),
            "speak": lambda: anext(sick.speak(SECRET)),
            "judge": lambda: sick.judge([{"first": SECRET}], ASKED_OF_JUDGE),
            "student": lambda: Student(loaded("a"), lambda _: sick, lambda _: None).label(
                [SECRET], key("a")
            ),
        }[call]
        with pytest.raises(Failed) as failed:
            await asked()
        await sick.close()
        return failed.value

    error = asyncio.run(scenario())
    assert SECRET not in told(error)
    assert str(error).startswith("KeyError at serve/test_failures.py:")
    assert "; for ValueError at serve/test_failures.py:" in str(error)
    assert "serve/teacher.py:" in str(error)


def test_an_ingress_says_nothing_of_what_a_replica_raised():
    """Not even of one that tells its words: Serve's own, say, or one of an older version."""
    remote = RayTaskError("label", f"Traceback of KeyError: {SECRET}", KeyError(SECRET))

    def call(*_: Any) -> Any:
        async def answer() -> None:
            raise remote.as_instanceof_cause()

        return answer()

    teacher = TeacherByHandle(SimpleNamespace(label=SimpleNamespace(remote=call)))  # type: ignore[arg-type]
    teacher.unready = None
    with pytest.raises(TeacherUnavailable, match="failed on this request") as refused:
        asyncio.run(teacher.labels([SECRET]))
    assert SECRET not in told(refused.value)


def test_what_nobody_foresaw_is_raised_to_serve_without_its_words():
    async def answer(texts: Sequence[str], *_: Any) -> None:
        await fails(texts)

    async def ask() -> httpx.Response:
        app = api(tiny.live(SimpleNamespace(answer=answer), BUNDLE), lambda: None)
        silent = httpx.ASGITransport(app, raise_app_exceptions=False)
        for transport in (httpx.ASGITransport(app), silent):
            async with httpx.AsyncClient(transport=transport, base_url="http://c") as client:
                body = {"model": "cascade", "prompt": SECRET}
                if transport is silent:
                    return await client.post("/v1/completions", json=body)
                with pytest.raises(Failed, match="KeyError at") as failed:
                    await client.post("/v1/completions", json=body)
                assert SECRET not in told(failed.value)
        raise AssertionError

    response = asyncio.run(ask())
    assert response.status_code == 500 and SECRET not in response.text
    assert "(KeyError)" in response.json()["error"]["message"]


def sick_classes() -> tuple[type, type]:
    """Of a teacher and an ingress; pickled whole, as classes of a function are."""
    import threading

    from serve.accounts import GivenUp
    from serve.ingress import Ingress
    from serve.students import Encoders
    from serve.teacher import Teacher

    class SickTeacher(Teacher):
        def __init__(self, _: Any, labels: Any, columns: Sequence[str], *__: Any, **___: Any):
            self._labels, self._columns, self._given_up = labels, columns, GivenUp()
            self._engine: Any = SimpleNamespace(alive=True, close=lambda: None)
            self._failure, self._loop = None, asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def _label_one(self, text: str) -> Any:
            raise KeyError(text)

    class SickEncoders(Encoders):
        def decide(self, texts: Sequence[str], stage: int = 0) -> Any:
            raise LookupError(texts)

    class SickIngress(Ingress):
        def _student(self, loaded: Any, readers: Any, rule: Any) -> Any:
            return SickEncoders(loaded, readers, rule)

    return SickTeacher, SickIngress


def test_no_log_of_ray_has_the_text_of_a_request_that_failed(
    cascade: Running, monkeypatch: pytest.MonkeyPatch
):
    from ray import serve

    from serve import app

    teacher, ingress = sick_classes()
    actor: Callable[..., Any] = app._actor
    monkeypatch.setattr(app, "Teacher", teacher)
    monkeypatch.setattr(app, "Ingress", ingress)
    monkeypatch.setattr(app, "_actor", lambda settings, *_: actor(settings, 0))
    serve.run(app.build(cascade.run.bundle_dir), name="sick", route_prefix="/sick")
    try:
        said = {
            model: cascade.client.post(
                "/sick/v1/classify", json={"input": ["a", SECRET], "model": model}
            )
            for model in ("student", "teacher")
        }
        assert said["student"].status_code == 500 and said["teacher"].status_code == 503
        assert "(LookupError)" in said["student"].json()["error"]["message"]
        deadline = time.monotonic() + 20
        here = "at serve/test_failures.py:"
        while not (
            len(logs_with(f"KeyError {here}")) >= 2 and logs_with(f"LookupError {here}")
        ):  # of the ingress and of the teacher
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert not logs_with(SECRET)
    finally:
        serve.delete("sick")


def logs_with(words: str) -> list[Path]:
    """Of this test's own Ray; others may run on this machine."""
    from ray._private.worker import _global_node

    files = [path for path in Path(_global_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert files
    return [path for path in files if words.encode() in path.read_bytes()]
