"""The official `openai` client against the cascade's endpoints, without Ray."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import numpy as np
import openai
import pytest

from journeyman.cascade.answering import Answers
from journeyman.cascade.policy import Decision
from journeyman.cascade.refusals import DeadlinePassed, Overloaded, Refusal, TextRefused
from serve.http import api
from tests.serve import tiny

P = {"banking": 0.05, "travel": 0.9, "kitchen & dining": 0.05}


class Cascade:
    """Says travel to all; the teacher does for texts with "hard" in them. Or raises."""

    def __init__(self, error: Refusal | None = None, void: bool = False) -> None:
        self.error = error
        self.void = frozenset({0}) if void else frozenset()
        self.calls = 0

    async def answer(self, texts: list[str], asked: str) -> Answers:
        self.calls += 1
        if self.error:
            raise self.error
        by_teacher = [asked == "teacher" or "hard" in text for text in texts]
        decisions = tuple(
            Decision(
                answered_by="teacher" if hard else "student",
                label="travel",
                confidence=0.4 if hard else 0.85,
                probabilities=np.array(list(P.values())),
            )
            for hard in by_teacher
        )
        n = sum(by_teacher)
        return Answers(
            decisions=decisions,
            teacher_prompt_tokens=30 * n,
            teacher_output_tokens=3 * n,
            void=self.void,
        )


@pytest.fixture(scope="module")
def bundle(run: tiny.Run):
    return run.bundle


def ask(
    bundle,
    talk: Callable[[openai.AsyncOpenAI], Awaitable],
    cascade: Cascade | None = None,
    is_tightened: bool = False,
):
    """What ``talk`` returns; it is given the official client."""
    live = tiny.live(cascade or Cascade(), bundle, is_tightened=is_tightened)  # type: ignore[arg-type]
    app = api(live, lambda: None)

    async def call():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        http = httpx.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://cascade/v1", http_client=http
        ) as client:
            return await talk(client)

    return asyncio.run(call())


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_answered_with_the_label_and_says_who_answered(bundle):
    async def talk(client):
        chat = client.chat.completions.with_raw_response
        return [
            await chat.create(model="cascade", messages=user(text), temperature=0.2, max_tokens=9)
            for text in ("fly me home", "hard one")
        ]

    easy, hard = ask(bundle, talk)
    completion = easy.parse()
    assert completion.object == "chat.completion" and completion.model == "cascade"
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "travel")
    assert choice.finish_reason == "stop" and choice.logprobs is None
    assert completion.usage.total_tokens == 0
    assert hard.parse().usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 30, "completion_tokens": 3, "total_tokens": 33,
    }  # fmt: skip
    note = completion.journeyman
    assert note["answered_by"] == ["student"] and note["confidence"] == [0.85]
    assert note["probabilities"] == [P] and note["bundle"] == bundle.bundle_id
    assert note["guarantee"]["holds"] is True
    assert easy.headers["x-journeyman-answered-by"] == "student"
    assert easy.headers["x-journeyman-confidence"] == "0.850000"
    assert easy.headers["x-journeyman-guarantee"] == "holds"
    assert hard.headers["x-journeyman-answered-by"] == "teacher"


def test_a_stream_carries_the_same_answer_and_usage_where_it_is_asked_for(bundle):
    async def talk(client):
        stream = await client.chat.completions.create(
            model="cascade",
            messages=user("hard one"),
            stream=True,
            stream_options={"include_usage": True},
        )
        return [chunk async for chunk in stream]

    chunks = ask(bundle, talk)
    said = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert said[0].role == "assistant"
    assert "".join(delta.content or "" for delta in said) == "travel"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "stop"]
    assert chunks[-1].usage.total_tokens == 33 and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].journeyman["answered_by"] == ["teacher"]


def test_logprobs_are_those_of_the_labels(bundle):
    async def talk(client):
        return await client.chat.completions.create(
            model="cascade", messages=user("x"), logprobs=True, top_logprobs=2
        )

    [said] = ask(bundle, talk).choices[0].logprobs.content
    assert said.token == "travel" and said.logprob == pytest.approx(np.log(0.9))
    assert [(t.token, round(np.exp(t.logprob), 6)) for t in said.top_logprobs] == [
        ("travel", 0.9), ("banking", 0.05),
    ]  # fmt: skip


def test_completions_take_several_prompts_and_stop_strings(bundle):
    async def talk(client):
        both = await client.completions.create(
            model="cascade", prompt=["a", "hard"], logprobs=1, stop=["vel"]
        )
        stream = await client.completions.create(model="student", prompt=["a", "b"], stream=True)
        return both, [chunk async for chunk in stream]

    both, chunks = ask(bundle, talk)
    assert [(c.index, c.text) for c in both.choices] == [(0, "tra"), (1, "tra")]
    assert both.choices[0].logprobs.tokens == ["travel"]
    assert both.journeyman["answered_by"] == ["student", "teacher"]
    assert both.journeyman["guarantee"] is None, "what is sent is no label that was certified"
    assert [c.choices[0].text for c in chunks] == ["travel", "travel"]
    assert chunks[-1].journeyman["guarantee"] is None


def test_a_stop_string_that_cuts_a_label_takes_its_promise_and_another_does_not(bundle):
    async def talk(client):
        chat = client.chat.completions.with_raw_response
        return [
            await chat.create(model="cascade", messages=user("x"), stop=stop)
            for stop in ("vel", ["", "\n"])
        ]

    cut, whole = ask(bundle, talk)
    assert cut.parse().choices[0].message.content == "tra"
    assert cut.parse().journeyman["guarantee"] is None
    assert cut.headers["x-journeyman-guarantee"] == "none"
    assert whole.parse().choices[0].message.content == "travel"
    assert whole.headers["x-journeyman-guarantee"] == "holds"


def test_parameters_that_change_nothing_are_named_where_they_were_sent(bundle):
    async def talk(client):
        chat = client.chat.completions
        asked = {"model": "cascade", "messages": user("x")}
        stream = await chat.create(**asked, seed=3, stream=True)
        return [
            await chat.create(**asked),
            await chat.create(**asked, temperature=0, seed=7, top_p=None, max_completion_tokens=1),
            await client.completions.create(
                model="student", prompt="x", presence_penalty=0.5, frequency_penalty=0,
                max_tokens=2, stop="?",
            ),
            [chunk async for chunk in stream][-1],
        ]  # fmt: skip

    assert [answer.journeyman["ignored"] for answer in ask(bundle, talk)] == [
        [],
        ["temperature", "seed", "max_completion_tokens"],
        ["presence_penalty", "frequency_penalty", "max_tokens"],
        ["seed"],
    ]


def test_the_models_are_the_cascade_and_its_two_members(bundle):
    async def talk(client):
        return [model.id async for model in client.models.list()]

    assert ask(bundle, talk) == ["cascade", "student", "teacher"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unknown field tools"),
        ({"n": 2}, "n: input should be 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role: input should be"),
        ({"messages": user("a") + user("b")}, "messages: list should have at most 1 item"),
        ({"messages": user(" ")}, "messages.0.content"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"model": "gpt-5"}, "model: input should be 'cascade', 'student' or 'teacher'"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"temperature": 3}, "temperature: input should be less than or equal to 2"),
    ],
)
def test_what_it_cannot_do_is_refused_as_openai_does(bundle, asked: dict, sentence: str):
    async def talk(client):
        body = {"model": "cascade", "messages": user("x")} | asked
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**body)
        return refused.value

    error = ask(bundle, talk)
    assert sentence in error.body["message"], error.body
    assert error.code == "invalid_request" and error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "\ud800 hi"}],  # half of a character, which no tokenizer takes
        [{"type": "text", "text": "x" * 32_769}],
        [{"type": "text", "text": "x" * 20_000}] * 2,
        [{"type": "text", "text": "x"}] * 65,
        [0] * 100_000,
    ],
)
def test_parts_are_bounded_as_texts_are(bundle, parts: list):
    body = {"model": "teacher", "messages": [{"role": "user", "content": parts}]}

    async def post() -> httpx.Response:
        app = api(tiny.live(Cascade(), bundle), lambda: None)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            return await client.post("/v1/chat/completions", content=json.dumps(body))

    response = asyncio.run(post())
    assert response.status_code == 400, response.text
    assert len(response.text) < 2000


def test_parts_of_text_are_one_text(bundle):
    async def talk(client):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "hard one"}]
        return await client.chat.completions.create(
            model="cascade", messages=[{"role": "user", "content": parts}]
        )

    assert ask(bundle, talk).journeyman["answered_by"] == ["teacher"]


@pytest.mark.parametrize(
    ("refusal", "kind", "calls"),
    [
        (TextRefused(0, "too long"), openai.BadRequestError, 1),
        (Overloaded("full", 0.01), openai.InternalServerError, 3),  # the client tries again twice
        (DeadlinePassed("late"), openai.InternalServerError, 1),
    ],
)
def test_the_clients_own_retries_go_as_they_should(bundle, refusal: Refusal, kind, calls: int):
    cascade = Cascade(refusal)

    async def talk(client):
        with pytest.raises(kind, match=str(refusal)):
            await client.chat.completions.create(model="cascade", messages=user("x"))

    ask(bundle, talk, cascade)
    assert cascade.calls == calls


def test_an_answer_in_place_of_a_failing_teachers_says_that_nothing_is_promised(bundle):
    async def talk(client):
        return await client.chat.completions.with_raw_response.create(
            model="cascade", messages=user("x")
        )

    for is_tightened in (False, True):
        response = ask(bundle, talk, Cascade(void=True), is_tightened)
        assert response.headers["x-journeyman-guarantee"] == "void"
        guarantee = response.parse().journeyman["guarantee"]
        assert (guarantee["holds"], guarantee["reason"]) == (False, "void")


def test_once_audits_found_the_promise_broken_answers_say_so(bundle):
    async def talk(client):
        create = client.chat.completions.with_raw_response.create
        return [await create(model=model, messages=user("x")) for model in ("cascade", "student")]

    of_cascade, of_student = ask(bundle, talk, is_tightened=True)
    assert of_cascade.headers["x-journeyman-guarantee"] == "tightened"
    guarantee = of_cascade.parse().journeyman["guarantee"]
    assert (guarantee["holds"], guarantee["reason"]) == (False, "tightened")
    assert guarantee["alpha"] == bundle.served.alpha
    assert of_student.headers["x-journeyman-guarantee"] == "none"
