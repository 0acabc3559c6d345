"""Requests that no description makes: any method, path, header and body. Each ends within its
deadline, none in a 500, and none is answered behind a key that it does not have."""

import gzip
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve import gate
from serve.gate import MAX_BODY_BYTES
from tests.serve import fuzzing, tiny
from tests.serve.test_gate import KEY, ring

EXAMPLES = [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
OPEN = ("/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/healthz", "/readyz")
POSTS = ("/v1/classify", "/v1/chat/completions", "/v1/completions")
BEHIND_KEYS = (*POSTS, "/v1/models", "/v1/models/cascade", "/v1/bundle", "/v1/figures")
NOWHERE = (
    "/metrics", "/v1", "/v1/", "//v1/models", "/v1/models/", "/v1/models/../bundle", "/V1/MODELS",
    "/v1/classify/", "*", "/-/routes", "/-/healthz", "/docs/", "/.env",
)  # fmt: skip
GOOD = f"Bearer {KEY}".encode()
JSON = (b"content-type", b"application/json")

paths = st.one_of(
    st.sampled_from((*OPEN, *BEHIND_KEYS, *NOWHERE)),
    st.text(max_size=40).map(lambda rest: f"/{rest}"),
    st.text(max_size=40).map(lambda name: f"/v1/models/{name}"),
)
methods = st.sampled_from(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
)
presented = st.one_of(
    st.sampled_from(
        (b"", b"Bearer", b"Bearer ", GOOD[:-1], GOOD + b"x", GOOD.replace(b"Bearer", b"Basic"),
         b"Bearer " + "schlüssel".encode(), b"Bearer " + "schlüssel".encode("latin-1"),
         b"Bearer \xff\xfe", b"\xff", b"bearer\t" + KEY.encode(), GOOD + b", " + GOOD)
    ),
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda key: b"Bearer " + key),
)  # fmt: skip
other_headers = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(
                (b"content-type", b"content-length", b"accept", b"cookie", b"host", b"range",
                 b"x-request-id", b"content-encoding", b"transfer-encoding", b"origin", b"expect",
                 b"traceparent", b"access-control-request-method", b"x-forwarded-for")
            ),
            st.from_regex(rb"[a-z-]{1,20}", fullmatch=True),
        ),
        st.one_of(
            st.sampled_from((b"", b"-1", b"9" * 30, b"9" * 5000, b"1e9", b"gzip", b"\xc2\xb2",
                             b"application/json; charset=utf-7", b"multipart/form-data")),
            st.binary(max_size=40),
        ),
    ),
    max_size=6,
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=4),
    max_leaves=20,
)  # fmt: skip
names = st.sampled_from(
    ("input", "model", "messages", "prompt", "stream", "stop", "max_tokens", "logprobs", "echo",
     "top_logprobs", "stream_options", "n", "metadata", "temperature")
)  # fmt: skip
bodies = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(names, values, max_size=6).map(json.dumps).flatmap(
        lambda said: st.sampled_from(
            [said.encode(code) for code in ("utf-8", "utf-16", "utf-32")]
            + [gzip.compress(said.encode()), said.encode()[:-1], b"\xef\xbb\xbf" + said.encode()]
        )
    ),
    st.sampled_from(
        (b"[" * 100_000, b'{"input":' * 50_000, b"9" * 10_000, b'{"input": "\\ud800"}', b"NaN",
         b'{"input": 1e999, "model": NaN}', b'{"input": "\x00"}', b"null", b'"x"',
         b'{"input": "x", "input": ["x"]}', '{"input": "ü"}'.encode("latin-1"))
    ),
)  # fmt: skip
content_types = st.sampled_from(
    (b"application/json", b"text/plain", b"", b"application/x-ndjson", b"multipart/form-data",
     b"application/json; charset=latin-1")
)  # fmt: skip


@pytest.fixture(scope="module", params=["classifying", "writing"])
def app(request: pytest.FixtureRequest, run: tiny.Run) -> Any:
    if request.param == "classifying":
        return fuzzing.classifying(run.bundle, ring())
    return fuzzing.writing(ring(), request_timeout_s=0.3)


def hold(answer: fuzzing.Answer) -> None:
    """It ended, not by our failure, and an error has OpenAI's form."""
    assert answer.failure is None, repr(answer.failure)
    assert answer.ended and answer.status != 500
    if answer.status >= 400 and answer.body:
        error = json.loads(answer.body)["error"]
        assert set(error) == {"message", "type", "code"} and all(error.values())


def of_hypothesis(n: int) -> Any:
    return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("n", EXAMPLES)
def test_any_method_on_any_path_with_any_headers_is_answered_or_refused(app, n: int):
    @given(methods, paths, presented, other_headers, st.binary(max_size=60))
    @of_hypothesis(n)
    def check(method, path, key, more, query) -> None:
        answer = fuzzing.send(app, method, path, [(b"authorization", key), *more], query=query)
        hold(answer)
        knows = key == b"bearer\t" + KEY.encode()
        if path not in OPEN and not knows:
            assert answer.status in (401, 413)

    check()


@pytest.mark.parametrize("n", EXAMPLES)
def test_so_is_one_with_a_key(app, n: int):
    @given(methods, paths, other_headers, st.binary(max_size=60))
    @of_hypothesis(n)
    def check(method, path, more, query) -> None:
        hold(fuzzing.send(app, method, path, [(b"authorization", GOOD), *more], query=query))

    check()


@pytest.mark.parametrize("n", EXAMPLES)
def test_any_body_is_answered_or_refused(app, n: int):
    @given(st.sampled_from(POSTS), bodies, content_types, st.booleans(), st.booleans())
    @of_hypothesis(n)
    def check(path, body, kind, in_pieces, cut) -> None:
        pieces = [body[:7], body[7:]] if in_pieces else [body]
        headers = [(b"authorization", GOOD), (b"content-type", kind)]
        answer = fuzzing.send(app, "POST", path, headers, pieces, cut=cut)
        hold(answer)
        assert answer.status in (200, 400, 422)

    check()


@pytest.mark.parametrize("path", (*BEHIND_KEYS, "/nowhere"))
def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(app, path: str):
    piece = b" " * (1 << 20)
    too_many = [piece] * (MAX_BODY_BYTES // len(piece) + 1)
    headers = [(b"authorization", GOOD), JSON]
    said = (b"content-length", str(MAX_BODY_BYTES + 1).encode())
    lied = (b"content-length", b"2")
    announced = fuzzing.send(app, "POST", path, [*headers, said])
    assert announced.status == 413
    for more in ([], [lied]):
        answer = fuzzing.send(app, "POST", path, [*headers, *more], too_many)
        hold(answer)
        assert answer.status == (413 if path in POSTS else 404 if path == "/nowhere" else 405)


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_never_ends_is_given_up(app, path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "_BODY_S", 0.05)
    answer = fuzzing.send(app, "POST", path, [(b"authorization", GOOD), JSON], [b"{"], stalls=True)
    hold(answer)
    assert answer.status == 408


texts = st.text(min_size=1, max_size=80).filter(str.strip)


@pytest.mark.parametrize("n", EXAMPLES)
def test_each_stream_of_a_student_that_writes_ends_as_it_is_asked_to(n: int):
    writing = fuzzing.writing(request_timeout_s=0.3)

    @given(
        texts,
        st.sampled_from(("cascade", "student", "teacher")),
        st.lists(st.text(max_size=3), max_size=4),
        st.none() | st.integers(1, 30),
        st.booleans(),
        st.booleans(),
        st.sampled_from(("/v1/chat/completions", "/v1/completions")),
    )
    @of_hypothesis(n)
    def check(text, model, stop, limit, usage, logprobs, path) -> None:
        body = {
            "model": model, "stream": True, "stop": stop, "max_tokens": limit,
            "stream_options": {"include_usage": usage},
        }  # fmt: skip
        if path == "/v1/completions":
            body |= {"prompt": [text, text[::-1]] if text[::-1].strip() else text}
            body |= {"logprobs": 1} if logprobs else {}
        else:
            body |= {"messages": [{"role": "user", "content": text}], "logprobs": logprobs}
        answer = fuzzing.send(writing, "POST", path, [JSON], [json.dumps(body).encode()])
        hold(answer)
        assert answer.status in (200, 400, 503, 504)
        if answer.status == 200:
            *chunks, last = fuzzing.events(answer)
            assert last == "[DONE]" or last["error"]["message"]
            assert all("error" not in chunk for chunk in chunks)

    check()
