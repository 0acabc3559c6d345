"""A teacher's answer that is sent as it is written, over ASGI and by the official client."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman.cascade.answering import Answers, Cascade, Hear
from journeyman.cascade.policy import Decision, Escalation, Written
from journeyman.cascade.refusals import TeacherUnavailable
from journeyman.cascade.written_policy import WrittenPolicy
from journeyman.certify.sequence_scores import WrittenConfidence
from journeyman.recipe import Cascade as Settings
from serve.asking import TeacherByHandle
from serve.growth import More, Whole, gained
from serve.http import api
from serve.teacher import Unavailable
from tests.serve import tiny
from tests.serve.test_openai_written import BUNDLE, TOKENS

POLICY = WrittenPolicy(
    confidence=WrittenConfidence(score="mean_logprob"), accept_above=-1.0, same=str.__eq__
)


def wrote(tokens: Sequence[str], *logprobs: float) -> Written:
    return Written(
        text="".join(tokens),
        tokens=tuple(tokens),
        logprobs=np.array(logprobs),
        finish_reason="stop",
        n_prompt_tokens=7,
        n_output_tokens=len(tokens),
    )


class Student:
    """Is sure of what it is told to be sure of."""

    async def submit(self, items: Sequence[str]) -> list[Decision | Escalation]:
        own = wrote(["perhaps"], -0.5 if items[0] == "easy" else -3.0)
        return POLICY.decide_batch([own])


class Teacher:
    """Says its tokens one by one, the next when ``go`` is called, and fails after so many."""

    def __init__(self, fails_after: int | None = None, go: Callable[[], Any] | None = None) -> None:
        self.fails_after, self.go, self.cancelled = fails_after, go, False

    async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> list[Written]:
        try:
            for i in range(len(TOKENS)):
                if i == self.fails_after:
                    raise TeacherUnavailable("away", 1.0)
                if hear:
                    hear(wrote(TOKENS[: i + 1]))
                await (self.go() if self.go else asyncio.sleep(0.002))
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return [wrote(TOKENS)] * len(texts)


def app(teacher: Teacher, **settings: Any) -> Any:
    cascade = Cascade(POLICY, Student(), teacher, Settings(**settings))
    return api(tiny.live(cascade, BUNDLE), lambda: None)


def chat(teacher: Teacher, text: str = "hard", stream: bool = True, **more: Any) -> list[Any]:
    """The chunks that the official client gets."""
    settings = more.pop("settings", {})

    async def talk() -> list[Any]:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app(teacher, **settings)))
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://cascade/v1", http_client=http, max_retries=0
        ) as client:
            answer = await client.chat.completions.create(
                model="cascade", messages=[{"role": "user", "content": text}], stream=stream,
                **more,
            )  # fmt: skip
            return [chunk async for chunk in answer]

    return asyncio.run(talk())


def words(chunks: list[Any]) -> list[str]:
    return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]


class Client:
    """Reads a stream as it comes; goes away when told to."""

    def __init__(self) -> None:
        self.read = ""
        self.more = asyncio.Event()
        self.gone = asyncio.Event()

    async def ask(self, of: Any) -> None:
        body = {"model": "cascade", "messages": [{"role": "user", "content": "hard"}],
                "stream": True}  # fmt: skip
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not sent:
                await self.gone.wait()
            return sent.pop() if sent else {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await of(scope, receive, self.send)

    async def send(self, message: dict[str, Any]) -> None:
        self.read += message.get("body", b"").decode()
        self.more.set()


def test_each_token_is_sent_when_the_teacher_says_it():
    async def scenario() -> None:
        client = Client()
        said: list[str] = []

        async def heard() -> None:
            """Goes on once the client has read all that was said: forever, if it were held back."""
            said.append(TOKENS[len(said)])
            async with asyncio.timeout(5):
                while json.dumps(said[-1])[1:-1] not in client.read:
                    client.more.clear()
                    await client.more.wait()

        await client.ask(app(Teacher(go=heard)))
        assert said == list(TOKENS) and client.read.endswith("data: [DONE]\n\n")

    asyncio.run(scenario())


def test_a_client_that_goes_away_in_the_middle_takes_the_teachers_work_along():
    async def scenario() -> bool:
        client, teacher = Client(), Teacher()

        async def leave() -> None:
            client.gone.set()
            await asyncio.sleep(5)

        teacher.go = leave
        async with asyncio.timeout(2):
            await client.ask(app(teacher))
        await asyncio.sleep(0)
        return teacher.cancelled

    assert asyncio.run(scenario())


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_goes_away_before_the_first_piece_takes_the_teachers_work_along(
    has_begun: bool,
):
    """Serve cancels its request: as nothing is said yet, or as the response begins."""

    class Counting(Teacher):
        n_cancelled = 0

        async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> list[Written]:
            try:
                if has_begun and hear:
                    hear(wrote(TOKENS[:1]))
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.n_cancelled += 1
                raise
            return []

    class Leaving(Client):
        async def send(self, message: dict[str, Any]) -> None:
            self.more.set()
            await asyncio.Event().wait()

    async def scenario() -> tuple[int, str]:
        teacher, client = Counting(), Leaving()
        request = asyncio.create_task(client.ask(app(teacher)))
        if has_begun:
            await client.more.wait()
        else:
            await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.wait({request})
        await asyncio.sleep(0)
        return teacher.n_cancelled, client.read

    assert asyncio.run(scenario()) == (1, "")


def test_the_stream_says_the_same_as_one_answer_would():
    chunks = chat(Teacher(), stream_options={"include_usage": True})
    assert "".join(words(chunks)) == "".join(TOKENS) and len(words(chunks)) > 1
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 5 and chunks[-2].choices[0].finish_reason == "stop"
    note = chunks[-2].journeyman
    assert note["answered_by"] == ["teacher"] and note["confidence"] == [-3.0]
    assert note["guarantee"]["holds"] and note["bundle"] == BUNDLE.bundle_id


def test_what_the_student_may_say_and_logprobs_come_as_a_whole():
    assert words(chat(Teacher(), "easy")) == ["perhaps"]
    assert words(chat(Teacher(), logprobs=True)) == ["".join(TOKENS)]


@pytest.mark.parametrize(
    ("more", "said", "reason"),
    [({"stop": " bl"}, "The sky is", "stop"), ({"max_tokens": 2}, "The sky", "length")],
)
def test_a_stream_is_cut_as_one_answer_is(more: dict, said: str, reason: str):
    chunks = chat(Teacher(), **more)
    assert "".join(words(chunks)) == said and len(words(chunks)) > 1
    assert chunks[-1].choices[0].finish_reason == reason
    assert chunks[-1].journeyman["guarantee"] is None


@pytest.mark.parametrize("policy", ["reject", "degrade"])
def test_a_teacher_that_fails_in_the_middle_ends_the_stream_with_an_error(policy: str):
    """With ``degrade`` too: the student's answer is no end of what was said already."""
    with pytest.raises(openai.APIError, match=r"away|broke off"):
        chat(Teacher(fails_after=2), settings={"when_teacher_fails": policy})
    if policy == "degrade":  # of nothing said yet
        assert words(chat(Teacher(fails_after=0), settings={"when_teacher_fails": policy})) == [
            "perhaps"
        ]
    else:
        with pytest.raises(openai.InternalServerError) as refused:
            chat(Teacher(fails_after=0))
        assert refused.value.status_code == 503


def test_a_teacher_behind_a_handle_is_heard():
    parts: list[Any] = [
        gained("", "The", TOKENS[:1]), gained("The", "The sky", TOKENS[1:2]), wrote(TOKENS)
    ]  # fmt: skip

    class Response:
        def __aiter__(self) -> AsyncIterator[Any]:
            async def each() -> AsyncIterator[Any]:
                for part in parts:
                    yield part

            return each()

    streaming = SimpleNamespace(speak=SimpleNamespace(remote=lambda *_: Response()))
    teacher = TeacherByHandle(SimpleNamespace(options=lambda stream: streaming))  # type: ignore[arg-type]
    teacher.unready = None
    heard: list[str] = []
    [whole] = asyncio.run(teacher.labels(["x"], lambda written: heard.append(written.text)))
    assert heard == ["The", "The sky"]
    assert isinstance(whole, Written) and whole.text == "The sky is blue."
    parts[2] = Unavailable(reason="the teacher's engine died and is starting again", begun=True)
    with pytest.raises(TeacherUnavailable, match="engine died"):
        asyncio.run(teacher.labels(["x"], heard.append))  # type: ignore[arg-type]


@given(st.lists(st.text(alphabet="ab \ufffd", max_size=6)))
def test_parts_of_a_growing_answer_make_every_step_of_it_again(texts: list[str]):
    """Also where a step changes what the one before ended with."""
    whole, so_far = Whole(), ""
    for n, text in enumerate(texts):
        part = gained(so_far, text, (str(n),))
        written = whole.add(part)
        assert (written.text, written.tokens) == (text, tuple(map(str, range(n + 1))))
        so_far = text


def test_what_is_sent_of_an_answer_is_as_long_as_the_answer():
    steps = ["word " * n for n in range(200)]
    parts: list[More] = [
        gained(a, b, ()) for a, b in itertools.pairwise(steps)
    ]  # fmt: skip
    assert sum(len(part.text) for part in parts) == len(steps[-1])


def test_what_nobody_listens_to_is_not_heard():
    class Deaf(Teacher):
        async def labels(self, texts: Sequence[str], hear: Hear | None = None) -> list[Written]:
            assert hear is None
            return await super().labels(texts)

    async def both() -> Answers:
        return await Cascade(POLICY, Student(), Deaf(), Settings()).answer(["hard"])

    assert asyncio.run(both()).decisions[0].answered_by == "teacher"
