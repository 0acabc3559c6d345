"""The official `openai` client against a cascade that writes, without Ray."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from journeyman.cascade.answering import Answers
from journeyman.cascade.policy import Decision, Written
from journeyman.models import Model
from journeyman.recipe import Generate
from serve.http import api
from tests.serve import tiny

TOKENS = ("The", " sky", " is", " blue", ".")
LOGPROBS = (-0.1, -0.2, -0.3, -0.4, -0.5, -0.01)  # the last is of what ended it
MODEL = Model(reference="m", path=Path("m"), weights_digest="w", tokenizer_digest="t", size_bytes=1)
BUNDLE = tiny.a_written_bundle(
    MODEL, MODEL, Generate(kind="generate", prompt="{{ text }}", max_tokens=8), threshold=-1.0
)


def written(
    tokens: tuple[str, ...] = TOKENS,
    logprobs: tuple[float, ...] = LOGPROBS,
    text: str = "".join(TOKENS),
) -> Written:
    return Written(
        text=text,
        tokens=tokens,
        logprobs=np.array(logprobs),
        finish_reason="stop",
        n_prompt_tokens=7,
        n_output_tokens=6,
    )


class Cascade:
    """Says the same to all."""

    def __init__(self, said: Written) -> None:
        self._said = said

    async def answer(self, texts: list[str], asked: str) -> Answers:
        decision = Decision(
            answered_by="student", label=self._said.text, confidence=-0.25,
            probabilities=np.empty(0), written=self._said,
        )  # fmt: skip
        return Answers(decisions=(decision,) * len(texts))


def ask(talk: Callable[[openai.AsyncOpenAI], Awaitable], said: Written | None = None):
    """What ``talk`` returns; it is given the official client."""
    app = api(tiny.live(Cascade(said or written()), BUNDLE), lambda: None)

    async def call():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        http = httpx.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://cascade/v1", http_client=http
        ) as client:
            return await talk(client)

    return asyncio.run(call())


def chat(said: Written | None = None, **more: object):
    """The raw response to one message."""
    return ask(
        lambda client: client.chat.completions.with_raw_response.create(
            model="cascade", messages=[{"role": "user", "content": "Which colour?"}], **more
        ),
        said,
    )


def test_the_answer_is_what_was_written_and_says_who_wrote_it():
    raw = chat(temperature=0.7, seed=3)
    answer = raw.parse()
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("The sky is blue.", "stop")
    assert answer.system_fingerprint == BUNDLE.bundle_id
    note = answer.journeyman
    assert note["answered_by"] == ["student"] and note["confidence"] == [-0.25]
    assert note["probabilities"] == [{}] and note["guarantee"]["holds"] is True
    assert raw.headers["x-journeyman-guarantee"] == "holds"
    assert note["ignored"] == ["temperature", "seed"]
    assert chat(max_tokens=2).parse().journeyman["ignored"] == [], "it cuts what was written"
    vote = chat(written(tokens=(), text="42"), max_tokens=1).parse()  # of several samples
    assert vote.choices[0].message.content == "42" and vote.journeyman["ignored"] == ["max_tokens"]


def test_a_limit_cuts_between_tokens_and_then_nothing_is_promised():
    raw = chat(max_completion_tokens=2)
    [choice] = raw.parse().choices
    assert (choice.message.content, choice.finish_reason) == ("The sky", "length")
    assert raw.parse().journeyman["guarantee"] is None
    assert raw.headers["x-journeyman-guarantee"] == "none"
    assert chat(max_tokens=5).headers["x-journeyman-guarantee"] == "holds"  # it has no more


def test_a_stop_string_cuts_and_then_nothing_is_promised():
    raw = chat(stop=[" is", "."])
    [choice] = raw.parse().choices
    assert (choice.message.content, choice.finish_reason) == ("The sky", "stop")
    assert raw.headers["x-journeyman-guarantee"] == "none"
    both = chat(stop=".", max_tokens=3).parse().choices[0]
    assert (both.message.content, both.finish_reason) == ("The sky is", "length")


def test_logprobs_are_those_of_the_tokens_sent():
    content = chat(logprobs=True, top_logprobs=1).parse().choices[0].logprobs.content
    assert [token.token for token in content] == list(TOKENS)
    assert [token.logprob for token in content] == list(LOGPROBS[:5])
    assert content[1].top_logprobs[0].token == " sky"
    cut = chat(logprobs=True, max_tokens=2).parse().choices[0].logprobs.content
    assert [token.token for token in cut] == ["The", " sky"]
    assert cut[0].top_logprobs == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The sky is", ("The", " sky", " is", "\n", "Q:")),  # labels.stop: its tokens were written
        ("The sky is", ("The", " sky", " is", ".\n")),
        (" The sky is", ("The", " sky", " is", "\n")),  # as vLLM's text begins behind a prompt
    ],
)
def test_tokens_of_an_answer_that_a_stop_string_ended_are_those_in_its_text(text, tokens):
    said = written(tokens, LOGPROBS[: len(tokens)], text)
    content = chat(said, logprobs=True).parse().choices[0]
    assert content.message.content == text and content.finish_reason == "stop"
    of_text = [token.token for token in content.logprobs.content]
    assert "".join(of_text) == text and len(of_text) == 3
    assert [token.logprob for token in content.logprobs.content] == list(LOGPROBS[:3])
    assert chat(said, max_tokens=3).headers["x-journeyman-guarantee"] == "holds"
    assert chat(said, max_tokens=2).parse().choices[0].message.content == text.removesuffix(" is")
    within = chat(said, stop="s", logprobs=True).parse().choices[0]
    assert within.message.content == text[: text.index("s")]
    assert [token.token for token in within.logprobs.content] == of_text[:1]


def test_completions_say_where_in_the_text_each_token_is():
    async def talk(client):
        return await client.completions.create(
            model="cascade", prompt=["a", "b"], logprobs=1, max_tokens=3
        )

    answer = ask(talk)
    assert [choice.text for choice in answer.choices] == ["The sky is"] * 2
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[1].logprobs.tokens == ["The", " sky", " is"]
    assert answer.choices[1].logprobs.text_offset == [0, 3, 7]
    assert answer.choices[1].logprobs.top_logprobs == [{"The": -0.1}, {" sky": -0.2}, {" is": -0.3}]


@pytest.mark.parametrize("said", [written((), ()), written(TOKENS, ())])
def test_an_answer_whose_tokens_have_no_logprobs_gets_none(said: Written):
    choice = chat(said, logprobs=True).parse().choices[0]
    assert choice.message.content == "The sky is blue." and choice.logprobs.content == []


def test_a_stream_carries_the_same_answer():
    async def talk(client):
        stream = await client.chat.completions.create(
            model="cascade", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=4
        )
        return [chunk async for chunk in stream]

    chunks = ask(talk)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "The sky is blue"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].journeyman["guarantee"] is None


def test_it_does_not_classify():
    app = api(tiny.live(Cascade(written()), BUNDLE), lambda: None)

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://cascade") as client:
            return await client.post("/v1/classify", json={"input": "x"})

    response = asyncio.run(call())
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_classes"
    assert "/v1/chat/completions" in response.json()["error"]["message"]
