"""The HTTP edge alone, without Ray: what is said, and with which code."""

import asyncio

import httpx
import numpy as np
import pytest

from journeyman.cascade.answering import Answers
from journeyman.cascade.policy import Decision
from journeyman.cascade.refusals import (
    DeadlinePassed,
    Overloaded,
    Refusal,
    TeacherUnavailable,
    TextRefused,
)
from serve.http import api
from tests.serve import tiny

SECRET = "my pin is 4711"


class Cascade:
    """Answers "travel" to everything, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def answer(self, texts: list[str], asked: str) -> Answers:
        if self.error:
            raise self.error
        decision = Decision(
            answered_by="student",
            label="travel",
            confidence=0.9,
            probabilities=np.array([0.05, 0.9, 0.05]),
        )
        return Answers(
            decisions=(decision,) * len(texts), teacher_prompt_tokens=0, teacher_output_tokens=0
        )


@pytest.fixture(scope="module")
def bundle(run: tiny.Run):
    return run.bundle


def send(
    bundle, cascade: Cascade, method: str, path: str, unready=None, is_tightened=False, **request
):
    live = tiny.live(cascade, bundle, is_tightened=is_tightened)  # type: ignore[arg-type]
    app = api(live, lambda: unready)

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            return await client.request(method, path, **request)

    return asyncio.run(call())


def post(bundle, body, cascade: Cascade | None = None) -> httpx.Response:
    return send(bundle, cascade or Cascade(), "POST", "/v1/classify", json=body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"input": "x", "modell": "student"}, "unknown field modell; known are input, model."),
        ({}, "input: field required."),
        ({"input": 3}, "input must be a text, or a list of 1 to 256 texts (or "),
        ({"input": ["x", 3]}, "input must be a text, or a list of 1 to 256 texts (or "),
        ({"input": ""}, "input is blank."),
        ({"input": ["x", " \n"]}, "text 1 is blank."),
        ({"input": []}, "input: list should have at least 1 item after validation, not 0."),
        ({"input": ["x"] * 257}, "input: list should have at most 256 items"),
        ({"input": [[[0] * 300]]}, "input: list should have at most 256 items"),
        ({"input": "x"} | {f"f{i}": 0 for i in range(300)}, "the body has more than 256 fields."),
        ({"input": "x" * 32_769}, "input: string should have at most 32768 characters."),
        ({"input": "x", "model": "gpt"}, "model: input should be 'cascade', 'student' or"),
        ([], "the body is no JSON object (with Content-Type: application/json)."),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong_with_it(bundle, body, sentence: str):
    response = post(bundle, body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["message"].startswith(sentence), error
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'{"input": "\\ud800"}'])
def test_a_body_that_is_no_json_or_no_text_is_refused(bundle, content: bytes):
    headers = {"Content-Type": "application/json"}
    response = send(bundle, Cascade(), "POST", "/v1/classify", content=content, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"]
    assert error["code"] == "invalid_request"


@pytest.fixture(scope="module")
def pairs(bundle):
    """A bundle that needs another column beside the text."""
    return bundle.model_copy(update={"columns": ("passage", "text")})


def test_a_bundle_of_several_columns_takes_objects(pairs):
    row = {"text": "who", "passage": "they did"}
    for body, n in ((row, 1), ([row, row | {"text": "where"}], 2)):
        response = post(pairs, {"input": body})
        assert response.status_code == 200, response.text
        assert len(response.json()["results"]) == n
    assert send(pairs, Cascade(), "GET", "/v1/bundle").json()["columns"] == ["passage", "text"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (SECRET, "text 0: an object with the columns passage, text is needed, and a text was"),
        ({"text": SECRET}, "text 0: column passage is missing; needed are passage, text."),
        ([{"text": "a", "passage": "b"}, {"passage": SECRET}], "text 1: column text is missing"),
        ({"text": "a", "passage": "b", "user": SECRET}, "text 0: there are other columns than"),
        ({"text": " ", "passage": SECRET}, "text 0: column text is blank."),
    ],
)
def test_missing_and_other_columns_are_a_422_in_one_sentence(pairs, body, sentence: str):
    response = post(pairs, {"input": body})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "wrong_columns"), error
    assert error["message"].startswith(sentence) and SECRET not in response.text


def test_endpoints_that_take_a_prompt_alone_say_so_to_a_bundle_of_several_columns(pairs):
    body = {"model": "cascade", "prompt": "who"}
    response = send(pairs, Cascade(), "POST", "/v1/completions", json=body)
    assert response.status_code == 422
    assert (
        "which a prompt has no place for; ask /v1/classify" in response.json()["error"]["message"]
    )


def test_what_was_sent_is_never_sent_back_in_an_error(bundle):
    for body in ({"input": [SECRET, 7]}, {"input": SECRET, "x": SECRET}, {"input": [SECRET, ""]}):
        assert SECRET not in post(bundle, body).text
    failed = post(bundle, {"input": SECRET}, Cascade(RuntimeError(SECRET)))
    assert failed.status_code == 500 and SECRET not in failed.text
    assert failed.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    ("refusal", "status", "code", "header"),
    [
        (TextRefused(0, "too long"), 400, "text_refused", None),
        (Overloaded("too many", 3.2), 503, "teacher_queue_full", ("Retry-After", "4")),
        (TeacherUnavailable("away", 5.0), 503, "teacher_unavailable", ("Retry-After", "5")),
        (DeadlinePassed("late"), 504, "deadline_passed", ("x-should-retry", "false")),
    ],
)
def test_each_refusal_has_its_code_and_says_whether_to_try_again(
    bundle, refusal: Refusal, status: int, code: str, header: tuple[str, str] | None
):
    response = post(bundle, {"input": "x"}, Cascade(refusal))
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(refusal)
    assert response.json()["error"]["code"] == code
    if header:
        assert response.headers[header[0]] == header[1]


def test_one_text_and_a_list_of_one_are_answered_alike(bundle):
    one, listed = post(bundle, {"input": "x"}).json(), post(bundle, {"input": ["x"]}).json()
    assert one["results"] == listed["results"]
    assert one["results"][0]["probabilities"]["travel"] == 0.9


@pytest.mark.parametrize("is_tightened", [False, True])
def test_an_answer_and_the_figures_say_whether_the_promise_holds(bundle, is_tightened: bool):
    def ask(method: str, path: str, **request) -> httpx.Response:
        return send(bundle, Cascade(), method, path, is_tightened=is_tightened, **request)

    response = ask("POST", "/v1/classify", json={"input": "x"})
    word = "tightened" if is_tightened else "holds"
    assert response.headers["x-journeyman-guarantee"] == word
    assert ask("GET", "/v1/figures").json()["guarantee"] == word
    promise = response.json()["guarantee"]
    assert (promise["holds"], promise["reason"]) == (
        (False, "tightened") if is_tightened else (True, None)
    )


def test_it_is_ready_only_when_it_is(bundle):
    assert send(bundle, Cascade(), "GET", "/readyz").json() == {"status": "ready"}
    unready = send(bundle, Cascade(), "GET", "/readyz", unready="the teacher is starting")
    assert unready.status_code == 503
    assert unready.json()["error"]["message"] == "the teacher is starting"
    assert send(bundle, Cascade(), "GET", "/healthz", unready="no").status_code == 200


def test_another_route_or_method_is_refused_in_the_same_form(bundle):
    for method, path, status in (("GET", "/v1/chat", 404), ("GET", "/v1/classify", 405)):
        response = send(bundle, Cascade(), method, path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_the_openapi_page_describes_what_is_sent(bundle):
    schema = send(bundle, Cascade(), "GET", "/openapi.json").json()
    request = schema["components"]["schemas"]["ClassifyRequest"]
    assert request["properties"]["model"]["enum"] == ["cascade", "student", "teacher"]
    assert request["additionalProperties"] is False
    answer = schema["components"]["schemas"]["ClassifyAnswer"]["properties"]
    assert {"id", "bundle", "guarantee", "results", "usage"} <= set(answer)
