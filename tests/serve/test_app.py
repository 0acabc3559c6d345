"""The cascade over HTTP, as a client meets it: real Ray Serve, real vLLM, tiny models."""

import asyncio
import html
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import httpx
import numpy as np
import psutil
import pytest

from journeyman.cascade.answering import Cascade, listening
from journeyman.cascade.policy import Policy
from journeyman.cascade.refusals import DeadlinePassed
from journeyman.certify.calibration import Calibrator
from journeyman.certify.scores import score
from journeyman.errors import ClusterError
from journeyman.recipe import Cascade as Settings
from journeyman.teacher.answers import ClassLabels
from tests.conftest import children
from tests.serve import tiny
from tests.serve.conftest import Running
from tests.serve.test_failures import logs_with


def values(result: dict) -> np.ndarray:
    assert tuple(result["probabilities"]) == tiny.LABELS
    return np.array(list(result["probabilities"].values()))


def test_a_cascade_that_is_up_is_healthy_and_ready(cascade: Running):
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        response = cascade.client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": status})


def test_the_student_answers_what_it_is_sure_of(cascade: Running):
    run = cascade.run
    for text in run.accepted[:: len(run.accepted) // 4]:
        response = cascade.classify(text)
        assert response.status_code == 200, response.text
        answer = response.json()
        i = tiny.TEXTS.index(text)
        probabilities = Calibrator(temperature=tiny.TEMPERATURE).probabilities(run.logits[i][None])
        [result] = answer["results"]
        assert result["answered_by"] == "student"
        assert result["label"] == tiny.LABELS[int(run.logits[i].argmax())]
        assert values(result) == pytest.approx(probabilities[0], abs=1e-5)
        assert result["confidence"] == pytest.approx(score(probabilities, "margin")[0], abs=1e-5)
        assert answer["usage"] == {
            "teacher_prompt_tokens": 0,
            "teacher_output_tokens": 0,
            "answered_by_student": 1,
            "answered_by_teacher": 0,
        }


def test_the_teacher_answers_the_rest_as_transformers_would(cascade: Running):
    for text in cascade.run.escalated[:5]:
        answer = cascade.classify(text).json()
        [result] = answer["results"]
        expected = tiny.teacher_probabilities(cascade.run, text)
        assert result["answered_by"] == "teacher"
        assert values(result) == pytest.approx(expected, abs=1e-3)
        assert result["label"] == tiny.LABELS[int(expected.argmax())]
        i = tiny.TEXTS.index(text)
        assert result["confidence"] == pytest.approx(cascade.run.scores[i], abs=1e-5)
        assert answer["usage"]["teacher_prompt_tokens"] > 3 * len(text.split())


def test_each_answer_names_the_bundle_and_what_it_promises(cascade: Running):
    answer = cascade.classify(cascade.run.accepted[0]).json()
    assert answer["object"] == "classification" and answer["model"] == "cascade"
    assert answer["bundle"] == cascade.run.bundle.bundle_id
    promised = {"kind": "system_agreement", "alpha": 0.1, "delta": 0.2}
    assert answer["guarantee"] == {"holds": True, "reason": None, **promised}
    again = cascade.classify(cascade.run.accepted[0]).json()
    assert answer["id"] != again["id"] and answer["results"] == again["results"]


def test_a_list_is_answered_in_its_order_whoever_answers(cascade: Running):
    run = cascade.run
    results = cascade.results(tiny.TEXTS)
    by = ["student" if s > run.bundle.accept_above else "teacher" for s in run.scores]
    assert [r["answered_by"] for r in results] == by
    assert {"student", "teacher"} == set(by)
    for text, result in zip(tiny.TEXTS, results, strict=True):
        if result["answered_by"] == "teacher":
            expected = tiny.teacher_probabilities(run, text)
            assert values(result) == pytest.approx(expected, abs=1e-3)


def test_one_model_alone_may_be_asked_and_then_nothing_is_promised(cascade: Running):
    unsure, sure = cascade.run.escalated[0], cascade.run.accepted[0]
    student = cascade.classify(unsure, model="student").json()
    assert student["guarantee"] is None and student["model"] == "student"
    assert student["results"][0]["answered_by"] == "student"
    assert student["results"][0]["confidence"] < cascade.run.bundle.accept_above
    teacher = cascade.classify(sure, model="teacher").json()
    assert teacher["guarantee"] is None and teacher["results"][0]["confidence"] is None
    expected = tiny.teacher_probabilities(cascade.run, sure)
    assert values(teacher["results"][0]) == pytest.approx(expected, abs=1e-3)


def test_the_bundle_is_shown_without_its_curve(cascade: Running):
    card = cascade.client.get("/v1/bundle").json()
    assert card["id"] == cascade.run.bundle.bundle_id
    assert card["threshold"] == cascade.run.bundle.threshold
    assert card["guarantees"][0]["n_accepted"] == 20
    assert "curve" not in card


def test_a_text_that_the_teacher_cannot_take_is_refused_in_a_sentence(cascade: Running):
    response = cascade.classify(["fine", "too long " * 100], model="teacher")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "text_refused"
    assert error["message"].startswith("text 1: the prompt has")


def test_the_official_openai_client_works_unchanged(cascade: Running):
    import openai

    run = cascade.run
    with openai.OpenAI(api_key="none", base_url=f"{cascade.url}/v1") as client:
        for text, by in ((run.accepted[0], "student"), (run.escalated[0], "teacher")):
            said = client.chat.completions.create(
                model="cascade", messages=[{"role": "user", "content": text}]
            )
            [result] = cascade.results(text)
            assert said.choices[0].message.content == result["label"]
            assert said.journeyman["answered_by"] == [result["answered_by"]] == [by]  # type: ignore[attr-defined]
            assert (said.usage.prompt_tokens > 0) == (by == "teacher")  # type: ignore[union-attr]
            stream = client.chat.completions.create(
                model="cascade", messages=[{"role": "user", "content": text}], stream=True
            )
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert streamed == result["label"]


def test_many_clients_at_once_get_their_own_answers(cascade: Running):
    alone = dict(zip(tiny.TEXTS, cascade.results(tiny.TEXTS, model="student"), strict=True))

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=cascade.url, timeout=60) as client:
            bodies = [{"input": text, "model": "student"} for text in tiny.TEXTS * 3]
            return await asyncio.gather(*(client.post("/v1/classify", json=b) for b in bodies))

    for text, response in zip(tiny.TEXTS * 3, asyncio.run(ask_all()), strict=True):
        assert values(response.json()["results"][0]) == pytest.approx(values(alone[text]), abs=1e-5)


@pytest.mark.parametrize("heard", [False, True])
def test_a_deadline_stops_the_work_of_a_teacher_behind_a_handle(cascade: Running, heard: bool):
    """Also where it is to be heard, and has not said a word."""
    from ray import serve

    from serve.asking import TeacherByHandle

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Slow:
        def __init__(self) -> None:
            self.cancelled = 0

        async def label(self, texts: list[str]) -> list[ClassLabels]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return []

        async def speak(self, text: str) -> AsyncIterator[ClassLabels]:
            for label in await self.label([text]):
                yield label

        async def n_cancelled(self) -> int:
            return self.cancelled

    handle = serve.run(Slow.bind(), name="slow", route_prefix=None)

    async def ask() -> None:
        teacher = TeacherByHandle(handle)
        teacher.unready = None
        policy = Policy.from_bundle(cascade.run.bundle)
        asked = Cascade(policy, None, teacher, Settings(request_timeout_s=1.0))  # type: ignore[arg-type]
        if heard:
            listening.set(lambda _: None)
        with pytest.raises(DeadlinePassed, match="no answer within 1 s"):
            await asked.answer(["text"], "teacher")
        assert asked.waiting.n_waiting == 0

    asyncio.run(ask())
    deadline = time.monotonic() + 10
    while not handle.n_cancelled.remote().result() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert handle.n_cancelled.remote().result() == 1
    serve.delete("slow")


def test_a_second_cascade_in_the_same_ray_is_refused(cascade: Running):
    from serve.running import running

    with (
        pytest.raises(ClusterError, match="Ray Serve runs on this Ray cluster already"),
        running(cascade.run.bundle_dir),
    ):
        pass


def test_texts_stay_out_of_serves_logs(cascade: Running):
    secret = "plugh-4712"
    cascade.client.get("/", params={"text": secret})
    cascade.classify(f"book a {secret} flight")
    cascade.classify(secret * 100, model="teacher")
    cascade.classify([secret, 7])
    time.sleep(1)
    assert not logs_with(secret)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_asks_the_cascade_and_shows_who_answered_and_why(cascade: Running):
    for text, by in ((cascade.run.accepted[0], "student"), (cascade.run.escalated[0], "teacher")):
        page = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             "--virtual-time-budget=20000", f"{cascade.url}/?{urlencode({'text': text})}"],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
        [result] = cascade.results(text)
        assert html.escape(result["label"]) in page
        assert re.search(rf'<span class="who {by}" id="who">{by}</span>', page), page[-3000:]
        assert f"margin {result['confidence']:.3f}; it may answer above" in page
        assert re.search(r'id="by-student">[1-9]', page)
        # The live escalation rate, as a figure and as a line.
        assert re.search(r'id="rate">\d+(\.\d+)?\s?%', page), page[-3000:]
        assert re.search(r'id="history"[^>]* points="\d+,\d', page)
        assert "Promised: the student answers and differs" in page


# The last one: the engine needs its time to come back.
def test_a_killed_teacher_comes_back_and_meanwhile_the_student_answers(cascade: Running):
    [engine] = teachers_engines()
    engine.suspend()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(cascade.classify, text) for text in cascade.run.escalated[:3]]
        time.sleep(0.5)
        engine.kill()
        assert [request.result().status_code for request in asked] == [503, 503, 503]
    refused = until(lambda: cascade.classify(cascade.run.escalated[0]), 503, timeout_s=10)
    assert refused.json()["error"]["code"] == "teacher_unavailable"
    assert "starting again" in refused.json()["error"]["message"]
    assert int(refused.headers["Retry-After"]) > 0
    assert cascade.client.get("/readyz").status_code == 503
    assert cascade.client.get("/healthz").status_code == 200
    for text in cascade.run.accepted[:3]:
        assert cascade.results(text)[0]["answered_by"] == "student"
    back = until(lambda: cascade.classify(cascade.run.escalated[0]), 200, timeout_s=240)
    expected = tiny.teacher_probabilities(cascade.run, cascade.run.escalated[0])
    assert values(back.json()["results"][0]) == pytest.approx(expected, abs=1e-3)
    assert cascade.client.get("/readyz").status_code == 200


def teachers_replicas() -> list[psutil.Process]:
    return children("ServeReplica:cascade:Teacher")


def teachers_engines() -> list[psutil.Process]:
    """Engine processes of this test's own teacher; others may run on this machine."""
    [teacher] = teachers_replicas()
    return children("EngineCore", of=teacher)


def until(ask, status: int, timeout_s: float) -> httpx.Response:
    deadline = time.monotonic() + timeout_s
    while (response := ask()).status_code != status:
        assert response.status_code in (200, 503), response.text
        assert time.monotonic() < deadline, f"no {status} within {timeout_s} s"
        time.sleep(0.1)
    return response


def test_a_taken_port_is_said_before_anything_starts(ray_cluster, run: tiny.Run):
    from serve.running import running

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ClusterError, match=f"127.0.0.1:{port}: cannot listen there"),
            running(run.bundle_dir, port=port),
        ):
            pass
