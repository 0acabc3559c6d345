"""Prompts encoded together have the token ids that they have alone."""

import asyncio

import pytest

from journeyman import prompts
from journeyman.teacher.together import Together

TEXTS = ["", "one", "two words", "one", "<|im_end|> as text", "a template", "\N{PILE OF POO}" * 9]


@pytest.fixture
def tokenizer(teacher_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_model.path)


def test_all_that_wait_get_what_each_would_get_alone(tokenizer):
    wanted = [[("<|im_start|>", False), (f"{text} {i}", True)] for i in range(50) for text in TEXTS]
    wanted += [[(text, True)] for text in TEXTS]

    async def encoded():
        together = Together(tokenizer)
        return await asyncio.gather(*(together.encode(segments) for segments in wanted))

    assert asyncio.run(encoded()) == [prompts.encode(tokenizer, segments) for segments in wanted]


def test_they_are_encoded_in_batches_each_text_once(tokenizer, monkeypatch):
    batches = []
    stock = prompts.encode_texts
    monkeypatch.setattr(
        prompts, "encode_texts", lambda t, texts: batches.append(list(texts)) or stock(t, texts)
    )

    async def encode():
        together = Together(tokenizer)
        segments = [[(f"text {i % 30}", True)] for i in range(60)]
        await asyncio.gather(*(together.encode(some) for some in segments))

    asyncio.run(encode())

    assert batches == [[f"text {i}" for i in range(30)]]


def test_a_text_that_cannot_be_encoded_fails_alone(tokenizer):
    async def encode():
        together = Together(tokenizer)
        texts = ["before", "half a character \ud83d", "behind"]
        wanted = (together.encode([(text, True)]) for text in texts)
        return await asyncio.gather(*wanted, return_exceptions=True)

    before, broken, behind = asyncio.run(encode())

    assert before == prompts.encode(tokenizer, [("before", True)])
    assert behind == prompts.encode(tokenizer, [("behind", True)])
    with pytest.raises(type(broken)):
        prompts.encode(tokenizer, [("half a character \ud83d", True)])


def test_whoever_stops_waiting_stops_nobody_else(tokenizer):
    async def encode():
        together = Together(tokenizer)
        gone = asyncio.create_task(together.encode([("gone", True)]))
        stays = asyncio.create_task(together.encode([("stays", True)]))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(encode()) == prompts.encode(tokenizer, [("stays", True)])
