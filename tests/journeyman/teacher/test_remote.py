"""The teacher behind a URL, against a real local HTTP server that can be told to fail."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.recipe import Teacher
from journeyman.recipe.labels import Structured
from journeyman.teacher.answers import Refused
from journeyman.teacher.prompting import Rendered, Sampling
from journeyman.teacher.remote import RateLimited, RemoteTeacher, Unreachable
from journeyman.teacher.replies import word_logprobs

TOP = {" yes": -0.5, " no": -1.5, "yes": -3.0, " maybe": -4.0}
RAW = Rendered(segments=(("Is it so? ", False), ("a row", True)))
CHAT = Rendered(segments=(), messages=(("system", "Be brief."), ("user", "Is it so?")))
SAMPLING = Sampling(max_tokens=7, temperature=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What the server does with one request in place of answering it."""

    status: int = 200
    error: dict[str, Any] | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    dropped: bool = False


class Api:
    """A server that speaks OpenAI's format, and what was asked of it."""

    def __init__(self) -> None:
        self.faults: collections.deque[Fault | None] = collections.deque()
        self.models: Fault | None = None
        self.requests: list[tuple[str, dict[str, Any], str]] = []  # path, body, authorization
        self.times: list[float] = []
        self.answers_at_most = 100
        self.most_logprobs = 20
        self.finish_reasons = ["stop"]
        self.refusal: str | None = None
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None: ...

            def do_GET(self) -> None:
                listed = {"object": "list", "data": [{"id": "small"}, {"id": "teacher-7b"}]}
                self._send(api.models or Fault(body=json.dumps(listed).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with api._lock:
                    api.busy += 1
                    api.most_busy = max(api.busy, api.most_busy)
                    api.times.append(time.monotonic())
                    api.requests.append((self.path, body, self.headers["Authorization"]))
                    fault = api.faults.popleft() if api.faults else None
                if fault is None:
                    fault = api.answer(self.path, body)
                time.sleep(fault.delay_s)
                with api._lock:
                    api.busy -= 1
                self._send(fault)

            def _send(self, fault: Fault) -> None:
                if fault.dropped:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                content = fault.body or json.dumps({"error": fault.error or {}}).encode()
                try:
                    self.send_response(fault.status)
                    headers = {"Content-Type": "application/json"} | fault.headers
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:  # a client that waited no longer
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self, path: str, body: dict[str, Any]) -> Fault:
        chat = path == "/v1/chat/completions"
        k = body.get("top_logprobs") if chat else body.get("logprobs")
        if (k or 0) > self.most_logprobs:
            error = {"message": f"at most {self.most_logprobs} logprobs", "param": "logprobs"}
            return Fault(status=400, error=error)
        choices = []
        for i in range(min(body.get("n", 1), self.answers_at_most)):
            choice: dict[str, Any] = {
                "index": i,
                "finish_reason": self.finish_reasons[i % len(self.finish_reasons)],
            }
            if chat:
                message = {"role": "assistant", "content": f" chat {i}", "refusal": self.refusal}
                choice["message"] = message
                if body.get("logprobs"):
                    top = [{"token": t, "logprob": p} for t, p in TOP.items()][: k or 0]
                    token = {"token": " yes", "logprob": -0.5, "top_logprobs": top}
                    choice["logprobs"] = {"content": [token]}
            else:
                choice["text"] = f" text {i}"
                if k is not None:
                    top = [dict(list(TOP.items())[:k])]
                    choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": top}
            choices.append(choice)
        usage = {
            "prompt_tokens": 10,
            "completion_tokens": 3 * len(choices),
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        return Fault(body=json.dumps({"choices": choices, "usage": usage}).encode())

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.close()


def settings(url: str, **changes: Any) -> Teacher:
    given = {"model": "teacher-7b", "url": url, "request_timeout_s": 20, "max_retries": 3}
    return Teacher.model_validate(given | changes)


def with_teacher(url: str, use: Any, **changes: Any) -> Any:
    """What ``use`` makes of a started teacher."""

    async def run() -> Any:
        teacher = RemoteTeacher(settings(url, **changes))
        await teacher.start()
        try:
            return await use(teacher)
        finally:
            teacher.close()

    return asyncio.run(run())


def spoken(url: str, prompt: Rendered = CHAT, n: int = 1, **changes: Any) -> Any:
    return with_teacher(url, lambda teacher: teacher.speak(prompt, SAMPLING, n), **changes)


# --- what is asked, and what is made of the answer ---


def test_messages_go_to_chat_and_text_goes_to_completions(api: Api, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    chat = spoken(api.url, api_key_env="SOME_KEY")
    raw = spoken(api.url, RAW)
    (path, body, key), (raw_path, raw_body, _) = api.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer s3cret")
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it so?"},
    ]
    assert (raw_path, raw_body["prompt"]) == ("/v1/completions", "Is it so? a row")
    for sent in (body, raw_body):
        assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("teacher-7b", 7, 0.5)
        assert sent["top_p"] == 1.0
        assert not {"seed", "n", "stop"} & sent.keys()
    assert [c.text for c in (*chat.completions, *raw.completions)] == [" chat 0", " text 0"]
    for given in (chat, raw):
        (completion,) = given.completions
        assert (given.n_prompt_tokens, given.n_output_tokens, given.n_cached_tokens) == (10, 3, 4)
        assert (completion.finish_reason, given.truncated) == ("stop", False)
        assert (completion.token_ids.dtype, len(completion.token_ids)) == (np.int32, 0)
        assert completion.token_logprobs.tolist() == [-0.5]
        assert completion.recorded is None


def test_every_setting_of_sampling_is_sent(api: Api):
    sampling = Sampling(max_tokens=5, temperature=1.0, top_p=0.9, stop=("\n", "END"))
    with_teacher(api.url, lambda teacher: teacher.speak(CHAT, sampling, 3))
    (_, body, _) = api.requests[0]
    assert (body["top_p"], body["stop"], body["n"]) == (0.9, ["\n", "END"], 3)


def test_an_api_that_answers_once_is_asked_again_until_all_samples_are_there(api: Api):
    api.answers_at_most = 2
    given = spoken(api.url, n=5)
    assert [c.text for c in given.completions] == [" chat 0", " chat 1"] * 2 + [" chat 0"]
    assert [body.get("n") for _, body, _ in api.requests] == [5, 3, None]
    assert (given.n_prompt_tokens, given.n_output_tokens) == (30, 15)


@pytest.mark.parametrize("prompt", [CHAT, RAW])
def test_structured_output_is_asked_for_in_the_servers_terms(api: Api, prompt: Rendered):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    forms = [{"json_schema": schema}, {"regex": "[ab]+"}, {"choice": ("x", "y")}]
    for form in forms:
        sampling = Sampling(max_tokens=5, structured=Structured(**form))
        with_teacher(api.url, lambda t, sampling=sampling: t.speak(prompt, sampling, 1))
    bodies = [body for _, body, _ in api.requests]
    assert bodies[0]["response_format"]["json_schema"]["schema"] == schema
    assert [body.get("structured_outputs") for body in bodies] == [
        None,
        {"regex": "[ab]+"},
        {"choice": ["x", "y"]},
    ]


@pytest.mark.parametrize("prompt", [CHAT, RAW])
def test_the_words_logprobs_are_those_of_the_most_likely_tokens(api: Api, prompt: Rendered):
    words = [" no", " yes", "perhaps", "maybe"]
    logprobs, *tokens = with_teacher(api.url, lambda t: t.next_logprobs(prompt, words))
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, [-1.5, -0.5, -4.0, -4.0])
    assert tokens == [10, 3, 4]
    (_, body, _) = api.requests[0]
    assert (body["max_tokens"], body["temperature"], "top_p" in body) == (1, 0.0, False)
    assert body.get("top_logprobs", body["logprobs"]) == 20


def test_a_word_is_its_own_token_or_those_that_differ_in_spaces():
    top = [(" yes", -1.0), ("yes", -2.0), ("\nyes", -3.0), ("no", -4.0), ("nope", -5.0)]
    exact = word_logprobs(top, ["yes", "no"])
    np.testing.assert_allclose(exact, [-2, -4])
    around = word_logprobs(top, ["yes ", " no"])
    np.testing.assert_allclose(around[0], np.log(np.exp([-1.0, -2.0, -3.0]).sum()), rtol=1e-6)
    np.testing.assert_allclose(around[1], -4)
    # A token that is another word's is not counted twice.
    np.testing.assert_allclose(word_logprobs(top, ["yes ", "yes"])[0],
                               np.logaddexp(-1, -3), rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(word_logprobs(top, ["other"]), [-5])  # a bound from above


def test_an_api_that_gives_fewer_logprobs_is_asked_for_fewer_from_then_on(api: Api):
    api.most_logprobs = 5

    async def twice(teacher: RemoteTeacher) -> list[np.ndarray]:
        return [(await teacher.next_logprobs(CHAT, [" no"]))[0] for _ in range(2)]

    for logprobs in with_teacher(api.url, twice):
        np.testing.assert_allclose(logprobs, [-1.5])
    assert [body["top_logprobs"] for _, body, _ in api.requests] == [20, 5, 5]


def test_an_api_without_logprobs_can_speak_but_not_score(api: Api):
    refused = Fault(status=400, error={"message": "logprobs are not offered"})
    api.faults.extend([refused])

    async def twice(teacher: RemoteTeacher) -> None:
        for _ in range(2):
            (completion,) = (await teacher.speak(RAW, SAMPLING, 1)).completions
            assert completion.token_logprobs is None

    with_teacher(api.url, twice)
    assert ["logprobs" in body for _, body, _ in api.requests] == [True, False, False]
    choice = {"index": 0, "finish_reason": "length", "message": {"content": "yes"}}
    api.faults.append(Fault(body=json.dumps({"choices": [choice]}).encode()))
    with pytest.raises(ModelError, match=r"gives no log-probabilities of teacher-7b"):
        with_teacher(api.url, lambda t: t.next_logprobs(CHAT, ["yes"]))


def test_a_model_that_wants_another_name_for_max_tokens_gets_it(api: Api):
    error = {"message": "Use max_completion_tokens", "param": "max_tokens",
             "code": "unsupported_parameter"}  # fmt: skip
    api.faults.append(Fault(status=400, error=error))

    async def twice(teacher: RemoteTeacher) -> None:
        for _ in range(2):
            await teacher.speak(CHAT, SAMPLING, 1)

    with_teacher(api.url, twice)
    names = [[n for n in body if "tokens" in n] for _, body, _ in api.requests]
    assert names == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


# --- faults ---


def test_retry_after_is_waited_for(api: Api):
    api.faults.append(Fault(status=429, headers={"Retry-After": "2"}))
    assert spoken(api.url).completions[0].text == " chat 0"
    assert 2.0 <= api.times[1] - api.times[0] < 4.0


def test_a_pause_that_one_request_is_asked_for_holds_for_all(api: Api):
    api.faults.append(Fault(status=429, headers={"Retry-After": "2"}))

    async def one_and_then_more(teacher: RemoteTeacher):
        first = asyncio.create_task(teacher.speak(CHAT, SAMPLING, 1))
        while not api.times:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # its answer, which is 429, has come back
        await asyncio.gather(first, *(teacher.speak(CHAT, SAMPLING, 1) for _ in range(3)))

    with_teacher(api.url, one_and_then_more)
    assert len(api.times) == 5
    assert api.times[1] - api.times[0] >= 2.0


def test_a_connection_that_is_never_made_is_not_the_rows_fault(api: Api):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as held:
        for _ in range(2):  # its queue is full: whoever else knocks waits
            knocking = held.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(full.getsockname())
        elsewhere = f"http://127.0.0.1:{full.getsockname()[1]}/"
        api.faults.append(Fault(status=307, headers={"Location": elsewhere}))
        with pytest.raises(Unreachable, match="does not answer"):
            spoken(api.url, request_timeout_s=0.5, max_retries=0)


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(dropped=True), Fault(delay_s=0.6)])
def test_what_passes_is_tried_again_with_growing_pauses(api: Api, fault: Fault):
    api.faults.extend([fault, fault])
    given = spoken(api.url, request_timeout_s=0.4 if fault.delay_s else 20)
    assert given.completions[0].text == " chat 0"
    assert len(api.times) == 3
    first, second = np.diff(api.times)
    assert 0.3 < first < second


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_an_api_that_keeps_failing_is_unreachable_and_not_the_rows_fault(api: Api, status: int):
    api.faults.extend([Fault(status=status, error={"message": "later"})] * 2)
    with pytest.raises(Unreachable, match=f"answered {status}: later"):
        spoken(api.url, max_retries=1)
    assert len(api.requests) == 2


def test_a_pause_longer_than_the_client_waits_is_handed_on(api: Api):
    wait = {"retry-after": "3600"}
    api.faults.append(Fault(status=429, error={"message": "slow down"}, headers=wait))
    with pytest.raises(RateLimited, match="answered 429: slow down") as limited:
        spoken(api.url, max_retries=1)
    assert limited.value.retry_after_s == 3600


def test_an_api_that_drops_every_connection_is_unreachable(api: Api):
    api.faults.extend([Fault(dropped=True)] * 2)
    with pytest.raises(Unreachable, match="does not answer"):
        spoken(api.url, max_retries=1)
    assert len(api.requests) == 2


def test_an_api_that_never_answers_is_a_timeout(api: Api):
    api.faults.extend([Fault(delay_s=1.0)] * 2)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
        spoken(api.url, request_timeout_s=0.3, max_retries=1)
    assert len(api.requests) == 2


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_the_api_will_never_answer_is_refused_in_its_own_words_and_not_retried(api, status):
    async def second(teacher: RemoteTeacher) -> None:
        await teacher.speak(CHAT, SAMPLING, 1)
        error = {"message": "your input\nis  too long", "code": "context_length_exceeded"}
        api.faults.append(Fault(status=status, error=error))
        await teacher.speak(CHAT, SAMPLING, 1)

    with pytest.raises(Refused, match=r"^your input is too long$"):
        with_teacher(api.url, second)
    assert len(api.requests) == 2


def test_a_filtered_answer_is_refused_if_no_sample_is_left(api: Api):
    api.finish_reasons = ["content_filter", "stop"]
    given = spoken(api.url, n=2)
    assert [c.finish_reason for c in given.completions] == ["content_filter", "stop"]
    with pytest.raises(Refused, match="content filter"):
        spoken(api.url, n=1)
    with pytest.raises(Refused, match="content filter"):
        with_teacher(api.url, lambda t: t.next_logprobs(RAW, ["yes"]))
    api.refusal = "I cannot help with that."
    with pytest.raises(Refused, match=r"^I cannot help with that\.$"):
        spoken(api.url, n=2)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_does_not_open_the_api_is_named(api: Api, monkeypatch, status: int):
    fault = Fault(status=status, error={"message": "bad key"})
    api.models = fault
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ModelError, match=rf"{status} \(bad key\): SOME_KEY is unset"):
        spoken(api.url, api_key_env="SOME_KEY")
    assert api.requests == []
    api.models = None
    api.faults.append(fault)
    monkeypatch.setenv("SOME_KEY", "s3cret")
    with pytest.raises(ModelError, match="the key in SOME_KEY does not open it") as caught:
        spoken(api.url, api_key_env="SOME_KEY")
    assert "s3cret" not in str(caught.value)


def test_a_used_up_quota_ends_the_run(api: Api):
    error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
    api.faults.append(Fault(status=429, error=error))
    with pytest.raises(ModelError, match="no quota left"):
        spoken(api.url, max_retries=0)


def test_an_error_wrapped_in_a_200_is_not_an_answer(api: Api):
    api.faults.append(Fault(status=200, error={"message": "upstream is down", "code": 502}))
    with pytest.raises(Unreachable, match="upstream is down"):
        spoken(api.url)


# --- start ---


def test_the_model_must_be_served(api: Api):
    with pytest.raises(ModelError, match=r"does not serve 'teacher'; it serves .*teacher-7b"):
        spoken(api.url, model="teacher")
    api.models = Fault(body=json.dumps({"data": [{"id": f"m{i}"} for i in range(20)]}).encode())
    with pytest.raises(ModelError, match=r"it serves (m\d+, ){4}m\d+ and 15 others\.$"):
        spoken(api.url, model="m")


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_a_list_of_models_will_do(api: Api, status: int):
    api.models = Fault(status=status)
    assert spoken(api.url).completions[0].text == " chat 0"
    # But if it has never answered, an unknown path is the URL's fault and not the row's.
    api.faults.extend([Fault(status=404, error={"message": "no such path"})] * 2)
    with pytest.raises(ModelError, match=r"404 \(no such path\); look at teacher\.url"):
        spoken(api.url)


def test_a_url_that_nobody_answers_is_told_in_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match=rf"{url} does not answer") as caught:
            spoken(url, max_retries=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(body=b"<html>welcome</html>", headers={"Content-Type": "text/html"}), "below /v1"),
        (Fault(body=b"[]"), "below /v1"),
        (Fault(status=503, error={"message": "starting"}), r"answers 503 \(starting\)"),
        (Fault(delay_s=0.0, dropped=True), "does not answer"),
    ],
)
def test_a_url_that_is_no_api_is_told_in_one_sentence(api: Api, fault: Fault, words: str):
    api.models = fault
    with pytest.raises(ModelError, match=words) as caught:
        spoken(api.url, max_retries=0)
    assert "\n" not in str(caught.value)


def test_it_is_alive_from_start_to_close(api: Api):
    async def run() -> list[bool]:
        teacher = RemoteTeacher(settings(api.url))
        seen = [teacher.alive]
        await teacher.start()
        await teacher.start()  # does nothing
        seen.append(teacher.alive)
        teacher.close()
        teacher.close()
        seen.append(teacher.alive)
        await teacher.start()
        await teacher.speak(CHAT, SAMPLING, 1)
        return [*seen, teacher.alive]

    assert asyncio.run(run()) == [False, True, False, True]


# --- pace ---


def test_requests_keep_the_pace_of_the_recipe_and_no_more_than_max_num_seqs_run(api: Api):
    async def many(teacher: RemoteTeacher) -> None:
        await asyncio.gather(*(teacher.speak(CHAT, SAMPLING, 1) for _ in range(8)))

    with_teacher(api.url, many, requests_per_minute=600)
    assert np.diff(sorted(api.times)).mean() == pytest.approx(0.1, rel=0.3)
    api.times.clear()
    api.faults.extend(Fault(body=api.answer("/v1/chat/completions", {}).body, delay_s=0.2)
                      for _ in range(8))  # fmt: skip
    api.most_busy = 0
    with_teacher(api.url, many, max_num_seqs=3)
    assert api.most_busy == 3


def test_tokens_are_reserved_by_estimate_and_corrected_by_usage(api: Api):
    """Each request takes 13 tokens; 3 characters / 4 + 100 are reserved, 200 a second allowed."""
    prompt = Rendered(segments=(("abc", True),))
    sampling = Sampling(max_tokens=100)

    async def one_by_one(teacher: RemoteTeacher) -> None:
        for _ in range(6):
            await teacher.speak(prompt, sampling, 1)

    with_teacher(api.url, one_by_one, tokens_per_minute=200 * 60)
    assert np.diff(api.times).mean() == pytest.approx(13 / 200, rel=0.5)  # not 100.75 / 200
    api.times.clear()

    async def at_once(teacher: RemoteTeacher) -> None:
        await asyncio.gather(*(teacher.speak(prompt, sampling, 1) for _ in range(3)))

    with_teacher(api.url, at_once, tokens_per_minute=200 * 60)
    assert np.diff(sorted(api.times)).mean() == pytest.approx(100.75 / 200, rel=0.3)


# --- a real server ---


@contextlib.contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", str(model), "--served-model-name", "teacher", "--dtype", "float32",
                 "--enforce-eager", "--max-model-len", "512", "--block-size", "32",
                 "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its engine can be ended with it
        )
    try:
        wait_for(server, f"http://127.0.0.1:{port}/v1", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    async def up() -> None:
        teacher = RemoteTeacher(settings(url, model="teacher", max_retries=0))
        await teacher.start()
        teacher.close()

    for _ in range(480):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return asyncio.run(up())
        except ModelError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
def test_a_real_server_says_what_a_float32_forward_pass_says(teacher_model: Model, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_model.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher_model.path)
    raw = Rendered(segments=(("Request: ", False), ("how do i send money to ann", True),
                             ("\nTopic:", False)))  # fmt: skip
    chat = Rendered(segments=(), messages=(("user", "Name a colour. Answer in one word."),))
    turns = [{"role": "user", "content": "Name a colour. Answer in one word."}]
    templated = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = {
        prompt: tokenizer.encode(text, add_special_tokens=False)
        for prompt, text in ((raw, raw.text), (chat, templated))
    }

    def next_token(prompt: Rendered) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[prompt]])).logits[0, -1]
        return logits.double().log_softmax(-1).numpy()

    async def use(teacher: RemoteTeacher) -> None:
        for prompt in (raw, chat):
            reference = next_token(prompt)
            order = np.argsort(-reference)
            words = [tokenizer.decode([t]) for t in order[:6]]
            assert len({w.strip() for w in words}) == 6
            unlikely = tokenizer.decode([order[5000]])
            logprobs, n_prompt, n_output, _ = await teacher.next_logprobs(
                prompt, [*words, unlikely]
            )
            np.testing.assert_allclose(logprobs[:6], reference[order[:6]], atol=2e-3)
            assert logprobs[6] == pytest.approx(reference[order[19]], abs=2e-3)
            assert (n_prompt, n_output) == (len(ids[prompt]), 1)

            said = await teacher.speak(prompt, Sampling(max_tokens=12), 1)
            with torch.inference_mode():
                greedy = model.generate(
                    torch.tensor([ids[prompt]]), max_new_tokens=12, do_sample=False
                )[0, len(ids[prompt]) :]
            (completion,) = said.completions
            assert completion.text == tokenizer.decode(greedy, skip_special_tokens=True)
            assert said.n_prompt_tokens == len(ids[prompt])
            assert len(completion.token_logprobs) == said.n_output_tokens == len(greedy)
            assert completion.token_logprobs[0] == pytest.approx(reference[order[0]], abs=2e-3)

        sampling = Sampling(max_tokens=8, temperature=1.0, structured=Structured(choice=("up",)))
        given = await teacher.speak(raw, sampling, 3)
        assert [c.text for c in given.completions] == ["up"] * 3
        with pytest.raises(Refused, match="maximum context length is 512 tokens"):
            await teacher.speak(Rendered(segments=(("x " * 600, True),)), SAMPLING, 1)

    with vllm_server(teacher_model.path, tmp_path / "server.log") as url:
        with_teacher(url, use, model="teacher", request_timeout_s=120)
        with pytest.raises(ModelError, match="does not serve 'another'; it serves teacher"):
            spoken(url, model="another")
